"""A folder in a store becomes a directory on this machine, fetched once for all its processes.

    CACHE/<name>-<digest of names, sizes and ETags>/    each file by one rename, once whole

A folder that changed in its store is another directory. What a killed process has fetched is kept,
file by file; to delete any of it costs the time to fetch it again. Knows nothing of what is in the
files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from glmbatch.errors import InputError, TransientError
from glmbatch.store.files import PARTIAL, sync
from glmbatch.store.locks import exclusive
from glmbatch.store.paths import ObjectPath, location, version_of


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """An object of the folder, and which version of it belongs to the snapshot."""

    path: ObjectPath
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The objects of a folder by name, and the directory of those that were fetched."""

    directory: Path
    files: dict[str, SnapshotFile]

    def fetch(self, patterns: Sequence[str]) -> Path:
        """The directory, with the files whose names `patterns` fit; other processes wait meanwhile.

        TransientError when an object is no longer the one of the snapshot.
        """
        # Several processes of a cluster may share the cache; the first one fetches.
        with _held(self.directory):
            for name, file in self.files.items():
                wanted = any(fnmatchcase(name, pattern) for pattern in patterns)
                if wanted and not (self.directory / name).exists():
                    _download(file, self.directory / name)
        return self.directory


def snapshot_of(address: str, cache: str, patterns: Sequence[str]) -> Snapshot | None:
    """What the folder `address` holds now, of names that `patterns` fit; fetches nothing.

    Objects further down are no part of it. None when there are none.
    """
    folder = location(address)
    files: dict[str, SnapshotFile] = {}
    for path, info in folder.listed().items() if isinstance(folder, ObjectPath) else ():
        name = str(path.relative_to(folder))
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns):
            files[name] = SnapshotFile(path, info["size"], version_of(info))
    if not files:
        return None
    facts = [(name, file.size_bytes, file.version) for name, file in sorted(files.items())]
    # The address too: two folders may hold the same names and versions.
    digest = sha256(json.dumps([address, *facts]).encode()).hexdigest()
    return Snapshot(Path(cache).expanduser() / f"{folder.name}-{digest[:16]}", files)


def _download(file: SnapshotFile, target: Path) -> None:
    partial = target.with_name(f".{target.name}{PARTIAL}")
    try:
        file.path.download(partial)
        # Asked after the download, so that a change during it is found.
        same_size = partial.stat().st_size == file.size_bytes
        same = same_size and version_of(file.path.info()) == file.version
    except FileNotFoundError:
        same = False
    if not same:
        raise TransientError(f"{file.path}: was changed while it was fetched.")
    sync(partial)
    os.replace(partial, target)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Make `directory`, and hold it against other processes."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with exclusive(directory.with_name(f"{directory.name}.lock")):
            yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{directory}: cannot be written: {reason}. Set runtime.cache.") from error
