"""A folder on this machine or in a store, and operations over many of its files at once."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from glmbatch.errors import InputError
from glmbatch.store.files import (
    PARTIAL,
    is_link,
    put,
    reachable,
    real_path,
    settled,
    stamp_if_any,
    stamp_of,
    sync_for,
    writable,
)
from glmbatch.store.paths import Address, AnyPath, is_hidden, location, odd_part

Item = TypeVar("Item")
Made = TypeVar("Made")

REQUESTS_AT_ONCE = 16
# A listing of a store's folder costs a request for each 1,000 keys, the price of some 12 others.
KEYS_OF_A_LISTING, PRICE_OF_A_LISTING = 1000, 12
# Files of unknown origin are moved here; glmbatch deletes nothing in it.
ASIDE = "_glmbatch/aside"


def side_by_side(
    root: AnyPath, work: Callable[[Item], Made], items: Iterable[Item]
) -> Iterator[Made]:
    """The results of `work` for `items`, lazily, in order; in parallel if `root` is in a store."""
    if isinstance(root, Path):
        yield from map(work, items)
        return
    waiting = iter(items)
    # In windows, so that a caller that stops early does not cause requests for all items.
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        while window := list(islice(waiting, 4 * REQUESTS_AT_ONCE)):
            yield from pool.map(work, window)


def commit_all(files: Sequence[tuple[AnyPath, AnyPath]]) -> None:
    """Move finished files to their paths as `commit` does, many at once; creates folders.

    Files of the same store are copied, and stay.
    """
    # All were written before the first is synced: a disk takes a fraction of the time for each.
    for source, path in files:
        sync_for(path, source)
    folders = dict.fromkeys(path.parent for _, path in files)
    for folder in folders:
        if isinstance(folder, Path):
            with writable(folder):
                folder.mkdir(parents=True, exist_ok=True)
    # All paths are on this machine, or none is.
    for _ in side_by_side(next(iter(folders), Path()), lambda file: put(*file), files):
        pass
    for folder in folders:
        sync_for(folder, folder)  # the folder stores the names


def unlink_all(root: AnyPath, paths: Iterable[AnyPath]) -> None:
    """Remove the files `paths` below `root`; ignores missing files and folders; safe to repeat."""

    def unlink(path: AnyPath) -> None:
        with suppress(IsADirectoryError):
            path.unlink(missing_ok=True)

    for _ in side_by_side(root, unlink, paths):
        pass


def remove_tree(folder: AnyPath) -> None:
    """Remove `folder` and everything in it; on this machine, errors are ignored."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        # One by one, because the store's package reads a folder's name as a pattern.
        unlink_all(folder, folder.listed())


def by_age(folder: AnyPath, ending: str) -> list[AnyPath]:
    """The files in `folder` whose names end with `ending`, the one written first at the front."""
    times = times_written(folder, ending)
    return [folder / name for name in sorted(times, key=times.__getitem__)]


def times_written(folder: AnyPath, ending: str) -> dict[str, float]:
    """When the files in `folder` with names that end with `ending` were written, by name.

    In seconds since 1970. In a store, from its listing.
    """
    if not isinstance(folder, Path):
        return {path.name: at.timestamp() for path, at in folder.times(f"*{ending}").items()}
    times = {}
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(ending):
                with suppress(FileNotFoundError):  # just replaced
                    times[entry.name] = entry.stat(follow_symlinks=False).st_mtime
    return times


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
            put(source, path)
            source.unlink(missing_ok=True)
        return path

    def existing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that exist, in order."""

        def find(name: str) -> str | None:
            return name if (self.path / name).exists() else None

        return [name for name in self.map(find, names) if name is not None]

    def stamps(self, names: Sequence[str], among: int) -> Iterator[tuple[int, ...] | None]:
        """The `version_stamp` of each of the files `names`, in order; None for one that is missing.

        In a store they come from a listing if that is cheaper; `among` is about how many files the
        folder has.
        """
        pages = 1 + among // KEYS_OF_A_LISTING
        if not isinstance(self.path, Path) and len(names) > PRICE_OF_A_LISTING * pages:
            # Names in partition folders have a beginning that _glmbatch does not share.
            first, last = min(names), max(names)
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
            found = self.path.keys("".join(letter for letter, _ in shared))
            yield from (stamp_of(found[name]) if name in found else None for name in names)
        else:
            yield from self.map(lambda name: stamp_if_any(self.path / name), names)

    def partials(self) -> list[AnyPath]:
        """Unfinished files in the folder itself; a store has none."""
        return [*self.path.glob(f".*{PARTIAL}")] if isinstance(self.path, Path) else []

    def names(self, below: str = "", *, visible: bool = False) -> Iterator[str]:
        """The names of all files below the folder `below`, in no order; links are not followed.

        With `visible` only those that readers of the folder see. Lists each folder once and makes
        no paths, because there may be 100,000 files.
        """
        if isinstance(self.path, Path):
            names = _names(self.path, below, visible=visible)
        else:
            begin = len(str(self.path)) + 1
            names = (str(path)[begin:] for path in (self.path / below).listed())
        for name in names:
            if not (visible and is_hidden(name)):
                yield name

    def visible_files(self) -> set[str]:
        """The names of the Parquet files, at any depth, that readers of the folder see."""
        with reachable(self.path):
            return {name for name in self.names(visible=True) if name.endswith(".parquet")}


def _names(root: Path, below: str, *, visible: bool) -> Iterator[str]:
    folders = [below]
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(root / folder)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        with entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if not entry.is_dir(follow_symlinks=False):
                    yield name
                elif not (visible and is_hidden(entry.name)):
                    folders.append(name)


class Listing:
    """The Parquet files `<stem>.<anything>` of a folder, listed once. Safe to use from threads.

    Its owner calls `add` and `discard` for its own changes. With `alone` there are no others, so a
    stem without a name has no file. Otherwise each lookup of such a stem asks the folder again.
    """

    def __init__(self, folder: AnyPath) -> None:
        self.alone = False
        self._folder = folder
        self._names: dict[str, tuple[str, ...]] = {}
        self._is_listed = False
        # The folder's time when it was listed; None if a later change might not show in it.
        self._listed_at: int | None = None
        self._lock = threading.Lock()

    def find(self, stem: str, *, again: bool = False) -> tuple[str, ...]:
        """The names with `stem`, in any order; `again` asks the folder even if some are known."""
        with self._lock:
            is_new = not self._is_listed
            if is_new:
                self._list()
            names = self._names.get(stem, ())
            if is_new or (not again and (names or self.alone)):
                return names
        return self._look_again(stem)

    def all(self) -> list[str]:
        """All names, in order, from the folder itself."""
        with self._lock:
            self._list()
            return sorted(chain(*self._names.values()))

    def add(self, name: str) -> None:
        """Note the new file `name`."""
        with self._lock:
            self._add(name)

    def discard(self, name: str) -> None:
        """Note that there is no file `name`."""
        with self._lock:
            stem = _stem(name)
            names = tuple(other for other in self._names.pop(stem, ()) if other != name)
            if names:
                self._names[stem] = names

    def forget(self) -> None:
        """Ask the folder at the next lookup."""
        with self._lock:
            self._is_listed = False

    def _look_again(self, stem: str) -> tuple[str, ...]:
        if isinstance(self._folder, Path):
            with self._lock:
                # The time of the folder tells of new names, and costs less than listing it.
                if self._listed_at is None or self._listed_at != _time_of(self._folder):
                    self._list()
                return self._names.get(stem, ())
        found = [path.name for path in self._folder.glob(f"{stem}.*.parquet")]
        with self._lock:
            for name in found:
                self._add(name)
            return self._names.get(stem, ())

    def _list(self) -> None:
        if isinstance(self._folder, Path):
            listed_at = _time_of(self._folder)
            self._listed_at = listed_at if settled(listed_at, time.time_ns()) else None
            try:
                names = os.listdir(self._folder)
            except (FileNotFoundError, NotADirectoryError):
                names = []
        else:
            names = [path.name for path in self._folder.glob("*.parquet")]
        self._names = {}
        self._is_listed = True
        for name in names:
            if name.endswith(".parquet"):
                self._add(name)

    def _add(self, name: str) -> None:
        stem = _stem(name)
        names = self._names.get(stem, ())
        if name not in names:
            self._names[stem] = (*names, name)


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _time_of(folder: Path) -> int:
    """When the names in `folder` changed last, in nanoseconds; 0 if there is no folder."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
