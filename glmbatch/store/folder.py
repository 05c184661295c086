"""A folder on this machine or in a store, and operations over many of its files at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from glmbatch.errors import InputError
from glmbatch.store.files import is_link, move, reachable, real_path, writable
from glmbatch.store.paths import Address, AnyPath, is_hidden, location, odd_part, side_by_side

Item = TypeVar("Item")
Made = TypeVar("Made")

# Files of unknown origin are moved here; glmbatch deletes nothing in it.
ASIDE = "_glmbatch/aside"


def _inner(name: str) -> str:
    # Split, because a manifest has 100,000 names and making a path of each takes half a second.
    if odd_part(name) or "\0" in name:
        raise ValueError("is not a name below a folder")
    return name


# The name of a file below a folder, checked not to lead out of it, because it is read from files.
Name = Annotated[str, AfterValidator(_inner)]


class Folder:
    """A folder on this machine or in a store, by its `path`; it need not exist."""

    def __init__(self, address: Address) -> None:
        self.path = location(address)

    def __truediv__(self, name: str) -> AnyPath:
        return self.path / name

    @property
    def local(self) -> Path | None:
        """The folder's path on this machine; None if it is in a store."""
        return self.path if isinstance(self.path, Path) else None

    def map(self, work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """The results of `work` for `items`, lazily and in order; in a store, in parallel."""
        yield from side_by_side(self.path, work, items)

    def place(self, name: str) -> AnyPath:
        """The path of the file `name`, to be written or removed.

        ValueError when the name leads out of the folder, InputError when a link on the way does.
        """
        path = self.path / _inner(name)
        if not real_path(path.parent).is_relative_to(real_path(self.path)):
            raise InputError(
                f"{path}: a link on the way leads out of {self.path}, where glmbatch must not "
                "write. Replace it with a folder, or set data.output."
            )
        return path

    def check_places(self, names: Iterable[str]) -> None:
        """Check the places of the files `names`, as `place` does, each folder once."""
        for folder in sorted({PurePosixPath(name).parent for name in names}):
            self.place(str(folder / "file"))

    def holds(self, name: str) -> bool:
        """Whether anything has the name `name`: a file, a folder, or a link to nowhere."""
        path = self.path / name
        return path.exists() or is_link(path)

    def put_aside(self, name: str) -> AnyPath:
        """Move what has the name `name` to `_glmbatch/aside`; return its new path."""
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
        """Those of `names` that exist, in order."""

        def find(name: str) -> str | None:
            return name if (self.path / name).exists() else None

        return [name for name in self.map(find, names) if name is not None]

    def visible_files(self) -> set[str]:
        """The names of the Parquet files, at any depth, that readers of the folder see."""
        with reachable(self.path):
            paths: list[AnyPath] = [*self.path.rglob("*.parquet")]
        names = (path.relative_to(self.path).as_posix() for path in paths)
        return {name for name in names if not is_hidden(name)}
