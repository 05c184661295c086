"""A checkpoint or adapter in an object store becomes a directory on this machine, fetched once for all its processes.

    CACHE/<name>-<digest of the objects' names, sizes and ETags>/    each file by one rename, after it was whole

A checkpoint that changed in its store is another directory; what killed processes left is gone on with, file by file.
Deleting any of it costs the time to fetch it again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from glmbatch.errors import InputError, TransientError
from glmbatch.glm.checkpoint.hub import SMALL_FILES, fetch_weights, locate_checkpoint
from glmbatch.glm.files import ADAPTER_FILES
from glmbatch.store.files import PARTIAL, naming, sync
from glmbatch.store.paths import ObjectPath, is_remote, location, version_of

# In a checkpoint that was fine-tuned here: what its training asked, which a step must ask too.
PROMPT_FILE = "glmbatch.json"
KINDS = ("*.json", "*.model", "*.safetensors", "*.bin")  # all that is ever read of a checkpoint


def local_checkpoint(path: str, revision: str | None, cache: str) -> Path:
    """The directory of checkpoint `path`; one in a store or on the hub is fetched first, never code of it.

    InputError when there is no such checkpoint, TransientError when store, hub or network failed.
    """
    if not is_remote(path):
        return locate_checkpoint(path, revision)
    if revision is not None:
        raise InputError(
            f"{path}: an object store has no revision {revision!r}. Unset model.revision."
        )
    with naming("model.path"):
        snapshot = _snapshot(path, cache, "model.path")
        return fetch_weights(snapshot.fetch([*SMALL_FILES, PROMPT_FILE]), snapshot.fetch, path)


def local_adapter(path: str, cache: str) -> str:
    """The directory of the LoRA adapter `path`; InputError when there is none."""
    if is_remote(path):
        with naming("model.adapter"):
            return str(_snapshot(path, cache, "model.adapter").fetch(ADAPTER_FILES))
    directory = os.path.expanduser(path)
    if not os.path.isdir(directory):
        raise InputError(
            f"{directory}: no such directory. Set model.adapter to the directory of a LoRA adapter."
        )
    return directory


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The objects of a folder by their names, each with size and version, and the directory that stands for them."""

    directory: Path
    objects: dict[str, tuple[ObjectPath, int, str]]

    def fetch(self, patterns: Sequence[str]) -> Path:
        """The directory, with the objects in it whose names `patterns` fit; other processes wait meanwhile."""
        with _sole(self.directory):
            for name, (path, size_bytes, version) in self.objects.items():
                file = self.directory / name
                if file.exists() or not any(fnmatchcase(name, pattern) for pattern in patterns):
                    continue
                partial = self.directory / f".{name}{PARTIAL}"
                try:
                    path.download(partial)
                    same = (
                        partial.stat().st_size == size_bytes and version_of(path.info()) == version
                    )
                except FileNotFoundError:
                    same = False
                if not same:
                    raise TransientError(f"{path}: was changed while it was fetched.")
                sync(partial)
                os.replace(partial, file)
        return self.directory


def _snapshot(address: str, cache: str, setting: str) -> _Snapshot:
    folder = location(address)
    objects: dict[str, tuple[ObjectPath, int, str]] = {}
    for path, info in folder.listed().items() if isinstance(folder, ObjectPath) else ():
        name = str(path.relative_to(folder))
        if "/" not in name and any(fnmatchcase(name, kind) for kind in KINDS):
            objects[name] = path, info["size"], version_of(info)
    if not objects:
        raise InputError(
            f"{address}: there is no such folder in the store, or no checkpoint in it. Set {setting}."
        )
    stated = json.dumps([address, *((name, *facts[1:]) for name, facts in sorted(objects.items()))])
    directory = (
        Path(cache).expanduser() / f"{folder.name}-{sha256(stated.encode()).hexdigest()[:16]}"
    )
    return _Snapshot(directory, objects)


@contextmanager
def _sole(directory: Path) -> Iterator[None]:
    """Hold `directory` against other processes."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with directory.with_name(f"{directory.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{directory}: cannot be written: {reason}. Set runtime.cache.") from error
