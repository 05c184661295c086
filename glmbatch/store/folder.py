"""A folder by its address, wherever that leads, and what is done with many files of it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from glmbatch.errors import InputError
from glmbatch.store.files import is_link, move, reachable, real_path, writable
from glmbatch.store.paths import Address, AnyPath, is_hidden, location, side_by_side

Item = TypeVar("Item")
Made = TypeVar("Made")

# What is moved out of the way because nobody can say whose it is; nothing is deleted there.
ASIDE = "_glmbatch/aside"


def _inner(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name or name == ".":
        raise ValueError("is no name below a folder")
    return name


# The name of a file below a folder, wherever it was read: it does not lead out.
Name = Annotated[str, AfterValidator(_inner)]


class Folder:
    """A folder on this machine or in a store; it need not exist. Holds nothing but its name."""

    def __init__(self, address: Address) -> None:
        self.path = location(address)

    def __truediv__(self, name: str) -> AnyPath:
        return self.path / name

    @property
    def local(self) -> Path | None:
        """The folder among this machine's files; None when it is in a store."""
        return self.path if isinstance(self.path, Path) else None

    def map(self, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """What `work` makes of each of `items`, in order; in a store, several at once."""
        yield from side_by_side(self.path, work, items)

    def place(self, name: str) -> AnyPath:
        """Where the file `name` lies, to be written or removed.

        InputError when the name, or a link on the way, leads out of the folder.
        """
        path = self.path / _inner(name)
        if not real_path(path.parent).is_relative_to(real_path(self.path)):
            raise InputError(
                f"{path}: a link on the way leads out of {self.path}, where nothing is written. "
                "Replace it by a folder, or set data.output."
            )
        return path

    def check_places(self, names: Iterable[str]) -> None:
        """InputError when a link on the way to one of the files `names` leads out of the folder."""
        for folder in sorted({PurePosixPath(name).parent for name in names}):
            self.place(str(folder / "file"))

    def holds(self, name: str) -> bool:
        """Whether anything stands at `name`: a file, a folder, or a link to nowhere."""
        path = self.path / name
        return path.exists() or is_link(path)

    def put_aside(self, name: str) -> AnyPath:
        """Move what stands at `name` to where nobody reads it; returns its new place."""
        source = self.place(name)
        path = self.path / ASIDE / name
        number = 0
        while path.exists():
            number += 1
            path = path.with_name(f"{PurePosixPath(name).name}.{number}")
        if isinstance(source, Path):
            with writable(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                source.rename(path)
        else:
            move(source, path)
            source.unlink(missing_ok=True)
        return path

    def existing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are there, in order."""

        def find(name: str) -> str | None:
            return name if (self.path / name).exists() else None

        return [name for name in self.map(find, names) if name is not None]

    def visible_files(self) -> set[str]:
        """The Parquet files at any depth that readers of the folder see."""
        with reachable(self.path):
            paths: list[AnyPath] = [*self.path.rglob("*.parquet")]
        names = (path.relative_to(self.path).as_posix() for path in paths)
        return {name for name in names if not is_hidden(name)}
