"""Commit, move and digest files, on this machine or in a store. Knows nothing of their content."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from glmbatch.errors import (
    MACHINE_ERRNOS,
    InputError,
    StoreRefused,
    TransientError,
    UnusableFile,
    shown,
)
from glmbatch.store.errors import UNWRITABLE, store_errors
from glmbatch.store.paths import Address, AnyPath, ObjectPath, ObjectStatus, location, status_opened

PARTIAL = ".partial"
OUTPUT = "data.output"  # what names most paths that are written
# Errors that mean: something else has the place of a file or folder.
BLOCKED = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY})
DIGEST_CHARS = 32  # a file's name contains this many of its digest's 64 hex digits
KEY_BYTES = 1024  # the longest key of an object that every store accepts
# A file may change twice within one tick of a file system's clock and then keep its times. The
# coarsest of these clocks, that of FAT, ticks every two seconds.
TICK_NS = 2_000_000_000


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Let StoreRefused errors of the block name the `setting` that led to the address."""
    try:
        yield
    except StoreRefused as error:
        raise StoreRefused(f"{error} Or set {setting}.") from error


def exists(address: Address) -> bool:
    """Whether there is a file or folder at `address`."""
    return location(address).exists()


def kind_of(path: AnyPath) -> Literal["file", "folder", "other"] | None:
    """What has the name `path`, with links followed; None if nothing. In a store, one question."""
    if isinstance(path, ObjectPath):
        return path.kind()
    if path.is_dir():
        return "folder"
    return ("file" if path.is_file() else "other") if path.exists() else None


def version_stamp(address: Address) -> tuple[int, ...]:
    """Numbers that change when a file is written or replaced, for comparison with later ones.

    On a disk: size, modification time, time of the last change of the inode (which no program can
    set), and inode number. In a store: size and a number made from the object's version.
    """
    return stamp_of(location(address).stat())


def stamp_if_any(address: Address) -> tuple[int, ...] | None:
    """The `version_stamp` of a file; None without one, or if it cannot be read."""
    try:
        return version_stamp(address)
    except OSError:
        return None


def stamp_of(status: os.stat_result | ObjectStatus) -> tuple[int, ...]:
    """The `version_stamp` of the file or object that has this `status`, also from a listing."""
    if isinstance(status, ObjectStatus):
        return status.st_size, status.st_mtime_ns
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def refuse_change(
    address: Address, stamp: tuple[int, ...], file: Any = None, digest: str = ""
) -> None:
    """UnusableFile if a file, or what was opened as `file`, has not the `stamp`.

    With a `digest`, a file on a disk of the same size and modification time is digested again: a
    link, other rights or a copy of the same bytes change only the rest of its stamp.
    """
    path = location(address)
    if file is None:
        status = path.stat()
    else:
        status = os.fstat(file.fileno()) if isinstance(path, Path) else status_opened(file)
    now = stamp_of(status)
    alike = now == stamp or (
        bool(digest)
        and isinstance(path, Path)
        and now[:2] == stamp[:2]
        and _digest_of(path, now) == digest
    )
    if not alike:
        raise UnusableFile(
            f"{shown(address)}: was changed while the run read it. Run again when it is complete."
        )


@lru_cache(1024)  # each fragment of a large file asks several times
def _digest_of(path: Path, stamp: tuple[int, ...]) -> str:
    return digest_file(path, stamp)


def is_settled(stamp: tuple[int, ...], looked_ns: int) -> bool:
    """Whether a later write must change `stamp`, which was taken at `looked_ns` since 1970.

    A write within a tick of the clock may leave all times as they are.
    """
    times = stamp[1:3] if len(stamp) == 4 else ()  # a store's version has no clock
    return all(settled(time_ns, looked_ns) for time_ns in times)


def settled(time_ns: int, looked_ns: int) -> bool:
    """Whether a change after `looked_ns` must show in a file's or folder's time `time_ns`."""
    return looked_ns - time_ns > TICK_NS


def real_path(address: Address) -> AnyPath:
    """The absolute path of `address` with links resolved. A store has no links."""
    path = location(address)
    # Unlike Path.resolve, realpath does not raise for circular links; opening the file will.
    return Path(os.path.realpath(path)) if isinstance(path, Path) else path


def whole_name(folder: AnyPath) -> str:
    """The absolute name of `folder`, with links as the user wrote them.

    Links are kept, so that an input named by a link has the same name when the link changes.
    """
    if not isinstance(folder, Path):
        return str(folder)
    # After a link, `..` does not mean the parent in the name, so links must be resolved.
    return str(folder.resolve()) if ".." in folder.parts else os.path.abspath(folder)


def too_long(folder: Address, name: str) -> str | None:
    """Why the name of a file `name` below `folder` would be too long; None if it would not.

    The reason continues a sentence such as "the name of its output ...".
    """
    path = location(folder) / name
    if not isinstance(path, Path):
        size, most = len(str(path).split("/", 3)[-1].encode()), KEY_BYTES
        return f"would have {size} bytes, {most} are allowed" if size > most else None
    place = Path(os.path.abspath(folder))
    while not place.is_dir() and place != place.parent:
        place = place.parent
    sizes = [len(os.fsencode(part)) for part in Path(name).parts]
    if max(sizes) > (most := os.pathconf(place, "PC_NAME_MAX")):
        return f"would have {max(sizes)} bytes, {most} are allowed here"
    whole = len(os.fsencode(os.path.abspath(path)))
    if whole >= (most := os.pathconf(place, "PC_PATH_MAX")):
        return f"would have {whole} bytes with its folders, {most - 1} are allowed here"
    return None


def is_link(path: AnyPath) -> bool:
    """Whether `path` is a link, also one to nowhere. A store has no links."""
    return isinstance(path, Path) and path.is_symlink()


def whole_address(address: str) -> str:
    """`address` made absolute, so that it means the same in another working directory."""
    path = location(address)
    return os.path.abspath(path) if isinstance(path, Path) else address


def digest_file(address: Address, stamp: tuple[int, ...] | None = None) -> str:
    """The SHA-256 of a file in hexadecimal.

    FileNotFoundError without the file, OSError or our errors when it cannot be read; UnusableFile
    when the opened file has not the `stamp`.
    """
    path = location(address)
    with store_errors(path), path.open("rb") as file:
        if stamp is not None:
            refuse_change(path, stamp, file)
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """The SHA-256 of files, computed again only when their status changed. Safe between threads.

    A change that keeps a file's times is noticed too, unless somebody sets the clock back.
    """

    def __init__(self) -> None:
        self._known: dict[AnyPath, tuple[tuple[int, ...], str]] = {}
        self._lock = threading.Lock()

    def of(self, path: AnyPath) -> str:
        """The digest of a file, as `digest_file`."""
        # In a store the status costs as many requests as a small object, which is kept in memory.
        if not isinstance(path, Path):
            return digest_file(path)
        stamp = version_stamp(path)
        with self._lock:
            known = self._known.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        digest = digest_file(path)
        with self._lock:
            if is_settled(stamp, time.time_ns()) and version_stamp(path) == stamp:
                self._known[path] = stamp, digest
            else:
                self._known.pop(path, None)
        return digest


@contextmanager
def partial_beside(address: Address, setting: str = OUTPUT) -> Iterator[Path]:
    """A path beside the file `address` to write to; deleted at the end if it still exists.

    The name starts with a dot, so readers ignore the file. A file for a store is first written to
    this machine. InputError when the folder cannot be created.
    """
    path = location(address)
    if isinstance(path, ObjectPath):
        with TemporaryDirectory(prefix="glmbatch-") as folder:
            yield Path(folder) / path.name
        return
    # Unique for this call, because other processes may write the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}{PARTIAL}")
    with writable(path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    finally:
        with suppress(OSError):  # must not hide the error that stopped the writing
            partial.unlink(missing_ok=True)


def commit(partial: Path, path: AnyPath, setting: str = OUTPUT) -> None:
    """Move the finished file `partial` to `path`, atomically; replaces a file there.

    The bytes are on disk before the rename, and the rename before this returns: after a power loss
    `path` is either complete or unchanged. In a store it is one upload, which becomes visible only
    when complete. InputError when `path` cannot be written, TransientError when the machine failed.
    """
    sync_for(path, partial)
    put(partial, path, setting)
    sync_for(path, path.parent)  # the folder stores the name


def put(source: AnyPath, path: AnyPath, setting: str = OUTPUT) -> None:
    """Give the file `source` the path `path`, or copy it there in a store; replaces a file there.

    What `sync_for` writes to the disk survives a power loss.
    """
    with writable(path, setting):
        if isinstance(path, Path):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # removes only an empty folder, so nothing is lost
                    path.rmdir()
            os.replace(str(source), path)
        elif isinstance(source, Path):
            path.upload(source)
        else:
            path.copy_from(source)


def sync_for(path: AnyPath, changed: AnyPath) -> None:
    """Flush the file or folder `changed` to disk, because `path` is written; nothing in a store."""
    if isinstance(path, Path) and isinstance(changed, Path):
        with writable(path):
            sync(changed)


def modified(path: AnyPath) -> float:
    """When `path` was last written, in seconds since 1970."""
    return path.modified().timestamp() if isinstance(path, ObjectPath) else path.stat().st_mtime


@contextmanager
def committed(address: Address, setting: str = OUTPUT) -> Iterator[Path]:
    """A path to write to; committed as the file `address` at the end if the block did not fail.

    Turns errors of writing into ours, as `writable` does.
    """
    with partial_beside(address, setting) as partial:
        with writable(address, setting):
            yield partial
        commit(partial, location(address), setting)


def sync(path: Path) -> None:
    """Flush the file or folder `path` to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def reachable(path: Address) -> Iterator[None]:
    """Turn the system's errors of reading or listing `path` into ours.

    TransientError if the machine failed, else InputError. Does not change FileNotFoundError and
    FileExistsError.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{path}: cannot be read now: {reason}.") from error
        raise InputError(f"{path}: cannot be read: {reason}. Set data.output.") from error


def check_file(what: str, file: str | os.PathLike[str]) -> None:
    """InputError when a command cannot write the `file` that `what` names, before hours of work."""
    path = location(os.fspath(file))
    if not isinstance(path, Path):
        return
    above = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if os.path.isdir(path) or not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise InputError(f"{what} {file}: no file can be written there. Name another place.")


@contextmanager
def writable(path: Address, setting: str = OUTPUT) -> Iterator[None]:
    """Turn the system's errors of writing `path`, which `setting` names, into ours.

    InputError if only the caller can fix it, else TransientError, for example for a full disk.
    """
    try:
        with naming(setting):
            yield
    except OSError as error:
        reason = str(error) if error.errno is None else os.strerror(error.errno)  # Arrow's is long
        if error.errno in UNWRITABLE or isinstance(error, FileExistsError | FileNotFoundError):
            way = "Remove what is in its place, or set" if error.errno in BLOCKED else "Set"
            raise InputError(f"{path}: cannot be written: {reason}. {way} {setting}.") from error
        raise TransientError(f"{path}: cannot be written: {reason}.") from error
