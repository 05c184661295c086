"""A folder by its address, wherever that leads, and what is done with many files of it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from glmbatch.store.paths import Address, AnyPath, location, side_by_side, unlink_all

Item = TypeVar("Item")
Made = TypeVar("Made")


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

    def existing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are there, in order."""

        def find(name: str) -> str | None:
            return name if (self.path / name).exists() else None

        return [name for name in self.map(find, names) if name is not None]

    def delete(self, names: Iterable[str]) -> None:
        """Remove the named files, as far as they are there."""
        unlink_all(self.path, [self.path / name for name in names])
