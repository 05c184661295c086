"""Requests about one object: read, change, delete it, or write it on the condition of its version.

A change is repeated here and not by the client, because each one passes the gates of its folder
first: a process that stood still may have lost the lock meanwhile (see locks.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from glmbatch.errors import Interrupted, StoreRefused, TransientError
from glmbatch.store.errors import (
    NOT_IMPLEMENTED,
    may_pass,
    status_of,
    store_errors,
    was_changed,
)
from glmbatch.store.objects.clients import Client, client

Made = TypeVar("Made")

BUCKET_PARTS = 2  # the parts of a bucket's own path: its scheme and its name
# A larger file is uploaded in parts of this size, some of them at the same time.
PART_BYTES, PARTS_AT_ONCE = 16 << 20, 4
# Seconds before each repetition of a change that failed and may pass.
PAUSES: tuple[float, ...] = (0.2, 1.0, 4.0)
# What is called before each change of an object in a folder, by folder.
GATES: dict[PurePosixPath, Callable[[PurePosixPath], None]] = {}
# The last known version of each guarded object; None if there was none.
_GUARDED: dict[PurePosixPath, dict[str, str] | None] = {}


def client_of(path: PurePosixPath) -> Client:
    """The clients of the bucket of `path`."""
    scheme, bucket, *_ = path.parts
    return client(scheme.removesuffix(":"), bucket)


def storage_options(path: Path | PurePosixPath) -> dict[str, str] | None:
    """How another library reaches the bucket of `path` (see `Client.options`); None on a disk."""
    if isinstance(path, Path):
        return None
    with store_errors(path):
        return client_of(path).options()


def key_of(path: PurePosixPath) -> str:
    """The key of `path` in its bucket; empty for the bucket itself."""
    return "/".join(path.parts[BUCKET_PARTS:])


def read(path: PurePosixPath, work: Callable[[Any, str], Made]) -> Made:
    """The result of `work`, which gets the client that repeats requests, and the key."""
    return repeated(path, lambda: work(client_of(path).reading, key_of(path)))


def change(path: PurePosixPath, work: Callable[[Any, str], Made]) -> Made:
    """The result of `work`, which sends one request that changes the store."""

    def send() -> Made:
        _pass_gates(path)
        return work(client_of(path).writing, key_of(path))

    return repeated(path, send)


def repeated(path: PurePosixPath, send: Callable[[], Made]) -> Made:
    """The result of `send`, which is called again after errors that may pass."""
    with store_errors(path):
        for pause in PAUSES:
            try:
                return send()
            except Exception as error:
                if not may_pass(error):
                    raise
            time.sleep(pause)
        return send()


def delete(path: PurePosixPath) -> None:
    """Delete the object. FileNotFoundError if it is missing, except in S3."""
    change(path, lambda store, key: store.delete(key))
    if path in _GUARDED:
        _GUARDED[path] = None


def guard(path: PurePosixPath) -> None:
    """From now on, write the object only over the version that is there now, or over our own."""
    try:
        _GUARDED[path] = read(path, lambda store, key: _version(store.head(key)))
    except FileNotFoundError:
        _GUARDED[path] = None


def unguard(folder: PurePosixPath) -> None:
    """Write the objects in `folder` whatever is there."""
    for path in [*_GUARDED]:
        if path.is_relative_to(folder):
            del _GUARDED[path]


def put(path: PurePosixPath, content: bytes | Path) -> None:
    """Write the object: bytes, or those of a local file, which may go in parts.

    Interrupted if it is guarded, and another process has written it.
    """
    if path in _GUARDED:
        _put_over(path, content)
    elif isinstance(content, Path) and content.stat().st_size > PART_BYTES:
        _pass_gates(path)
        # The client repeats a part that failed; they show only after the last request.
        read(
            path,
            lambda store, key: store.put(
                key, content, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
            ),
        )
    else:
        change(path, lambda store, key: store.put(key, content, use_multipart=False))


def _put_over(path: PurePosixPath, content: bytes | Path) -> None:
    """Write a guarded object over the version that is known."""
    mode: Any = _GUARDED[path] or "create"
    try:
        answer = change(path, lambda store, key: store.put(key, content, mode=mode))
    except (FileExistsError, FileNotFoundError, StoreRefused, TransientError) as error:
        if status_of(error) == NOT_IMPLEMENTED:  # the store has no such condition
            del _GUARDED[path]
            put(path, content)
        elif isinstance(error, OSError) or was_changed(error):
            _refuse_other(path, content, error)
        else:
            raise
    else:
        _GUARDED[path] = _version(answer)


def _refuse_other(path: PurePosixPath, content: bytes | Path, error: Exception) -> None:
    """Interrupted unless the object has this content: the answer to its writing was lost."""
    wanted = content if isinstance(content, bytes) else content.read_bytes()
    with suppress(FileNotFoundError):
        guard(path)
        if read(path, lambda store, key: bytes(store.get(key).bytes())) == wanted:
            return
    raise Interrupted(
        f"{path}: another run has written it, so this run stopped writing. Run again when that has "
        "ended."
    ) from error


def _version(meta: Any) -> dict[str, str]:
    """What a store compares: an ETag, or a number of its own."""
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def _pass_gates(path: PurePosixPath) -> None:
    for folder, gate in [*GATES.items()]:
        if path.is_relative_to(folder):
            gate(path)
