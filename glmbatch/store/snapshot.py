"""Fetch a folder from a store into a local directory, once for all processes of this machine.

A single file can be fetched for one process too, and the published files of an output.

    CACHE/<name>-<digest of names, sizes and ETags>/    each file appears by one rename
    CACHE/<name>-<digest of address>/<digest>/<file>    a published file

If the folder changes in its store, it gets a new directory. Files that a killed process fetched
completely are kept. The cache may be deleted; its files are then fetched again. Knows nothing of
their content.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from glmbatch.errors import InputError, TransientError
from glmbatch.store.files import PARTIAL, digest_file, sync
from glmbatch.store.folder import side_by_side
from glmbatch.store.locks import exclusive
from glmbatch.store.paths import AnyPath, ObjectPath, location


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """An object of the folder, and the version of it that belongs to the snapshot."""

    path: ObjectPath
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The objects of a folder by name, and the local directory for those that are fetched."""

    directory: Path
    files: dict[str, SnapshotFile]

    def fetch(self, patterns: Sequence[str]) -> Path:
        """Fetch the files that match `patterns`, and return the directory. Safe to repeat.

        Files that are there are not fetched again; other processes wait meanwhile. TransientError
        when an object has changed since the snapshot, InputError when the cache cannot be written.
        """
        # Processes of a cluster may share the cache; the first one fetches.
        with _held(self.directory):
            for name, file in self.files.items():
                wanted = any(fnmatchcase(name, pattern) for pattern in patterns)
                if wanted and not (self.directory / name).exists():
                    _download(file, self.directory / name)
        return self.directory


def snapshot_of(address: str, cache: str, patterns: Sequence[str]) -> Snapshot | None:
    """The objects directly in the folder `address` that match `patterns`; fetches nothing.

    `cache` is the local folder for all snapshots. None if there are no such objects.
    """
    folder = location(address)
    files: dict[str, SnapshotFile] = {}
    for path, facts in folder.listed().items() if isinstance(folder, ObjectPath) else ():
        name = str(path.relative_to(folder))
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns):
            files[name] = SnapshotFile(path, facts.size, facts.version)
    if not files:
        return None
    described = [(name, file.size_bytes, file.version) for name, file in sorted(files.items())]
    # With the address, because two folders may have the same names and versions.
    digest = sha256(json.dumps([address, *described]).encode()).hexdigest()
    return Snapshot(Path(cache).expanduser() / f"{folder.name}-{digest[:16]}", files)


def fetch_published(folder: ObjectPath, digests: Mapping[str, str], cache: str) -> Path:
    """The local directory with a folder's files by name and SHA-256; fetches those it lacks.

    Each file is at `copied_name` in it. Others are deleted: they belong to an earlier version.
    TransientError when an object has changed, InputError when the cache cannot be written.
    """
    address = sha256(str(folder).encode()).hexdigest()[:16]
    directory = Path(cache).expanduser() / f"{folder.name}-{address}"
    wanted = {copied_name(name, digest): name for name, digest in digests.items()}

    def fetch(copied: str) -> None:
        path = directory / copied
        path.parent.mkdir(parents=True, exist_ok=True)
        name = wanted[copied]
        _fetch(folder / name, path, lambda partial: digest_file(partial) == digests[name])

    with _held(directory):
        there = {path.relative_to(directory).as_posix() for path in directory.rglob("*.parquet")}
        for copied in there - wanted.keys():
            (directory / copied).unlink()
        for _ in side_by_side(folder, fetch, sorted(wanted.keys() - there)):
            pass
    return directory


def copied_name(name: str, digest: str) -> str:
    """Where `fetch_published` puts the file `name` with this digest."""
    return f"{digest[:16]}/{name}"


def open_copy(path: AnyPath) -> int:
    """A descriptor for reading a file; for an object, of a copy that is gone when it is closed."""
    if isinstance(path, Path):
        return os.open(path, os.O_RDONLY)
    with TemporaryDirectory(prefix="glmbatch-") as folder:
        path.download(copy := Path(folder) / path.name)
        return os.open(copy, os.O_RDONLY)


def _download(file: SnapshotFile, target: Path) -> None:
    def is_same(partial: Path) -> bool:
        same_size = partial.stat().st_size == file.size_bytes
        return same_size and file.path.facts().version == file.version

    _fetch(file.path, target, is_same)


def _fetch(source: ObjectPath, target: Path, is_same: Callable[[Path], bool]) -> None:
    """Fetch an object to `target`, by one rename, if the fetched bytes are those expected."""
    partial = target.with_name(f".{target.name}{PARTIAL}")
    try:
        source.download(partial)
        # Checked after the download, so that a change during it is detected.
        same = is_same(partial)
    except FileNotFoundError:
        same = False
    if not same:
        raise TransientError(f"{source}: was changed while it was fetched.")
    sync(partial)
    os.replace(partial, target)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Create `directory`, and lock it against other processes."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with exclusive(directory.with_name(f"{directory.name}.lock")):
            yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{directory}: cannot be written: {reason}. Set runtime.cache.") from error
