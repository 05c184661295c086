"""Files by name, on this machine or in a store: committing outputs, digests.

Knows nothing of what is in a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from glmbatch.errors import MACHINE_ERRNOS, GlmbatchError, InputError, StoreRefused, TransientError
from glmbatch.store.errors import UNWRITABLE, store_errors
from glmbatch.store.paths import Address, AnyPath, ObjectPath, location

PARTIAL = ".partial"
# Something else stands where a file or a folder is to be.
BLOCKED = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY})
MAGIC = b"PAR1"  # of every Parquet file that is not encrypted
DIGEST_CHARS = 32  # of a digest's 64, in a file's name
KEY_BYTES = 1024  # of an object's key, in every store


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Add to what a store refuses which `setting` led there."""
    try:
        yield
    except StoreRefused as error:
        raise StoreRefused(f"{error} Or set {setting}.") from error


def exists(address: Address) -> bool:
    """Whether there is a file or folder at `address`."""
    return location(address).exists()


def stamp_file(address: Address) -> tuple[int, int]:
    """A file's size in bytes and time of change in nanoseconds (in a store: its ETag's number)."""
    status = location(address).stat()
    return status.st_size, status.st_mtime_ns


def real_path(address: Address) -> AnyPath:
    """The path that `address` leads to, whole and without links. A store has no links."""
    path = location(address)
    # Unlike Path.resolve, realpath raises nothing where links go in a circle: opening the file
    # does.
    return Path(os.path.realpath(path)) if isinstance(path, Path) else path


def telling_size(path: AnyPath) -> int:
    """The bytes of a file that cannot be used, if they say something of its rows; else 0.

    The bytes of a pointer to a large file, of an error page, or of blocks that were never written
    say nothing; those of a Parquet file that was cut off do.
    """
    try:
        if not path.is_file() or path.stat().st_size <= len(MAGIC):
            return 0
        with path.open("rb") as file:
            return path.stat().st_size if file.read(len(MAGIC)) == MAGIC else 0
    except (OSError, GlmbatchError):  # gone by now, or out of reach
        return 0


def whole_name(folder: AnyPath) -> str:
    """The name of `folder` from the top, by the links that its user named it by.

    So a link that leads to another folder each night keeps its name.
    """
    if not isinstance(folder, Path):
        return str(folder)
    # Behind a link `..` is another folder than the one before it in the name.
    return str(folder.resolve()) if ".." in folder.parts else os.path.abspath(folder)


def too_long(folder: Address, name: str) -> str | None:
    """Why no file `name` below `folder` can be for its length, in bytes; None when it can."""
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
    """Whether `path` is a link, wherever that leads. A store has no links."""
    return isinstance(path, Path) and path.is_symlink()


def whole_address(address: str) -> str:
    """`address` as processes in other folders of this machine, or on others, understand it."""
    path = location(address)
    return os.path.abspath(path) if isinstance(path, Path) else address


def url_of(address: str) -> str:
    """A URL by which a browser finds the file `address`."""
    path = real_path(address)
    return path.as_uri() if isinstance(path, Path) else str(path)


def digest_file(address: Address) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    path = location(address)
    with store_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def partial_beside(address: Address) -> Iterator[Path]:
    """Give a name beside the file `address` to write to; what is left there at the end is removed.

    The name starts with a dot, so no reader takes it for data. What is for a store is first written
    on this machine.
    """
    path = location(address)
    if isinstance(path, ObjectPath):
        with TemporaryDirectory(prefix="glmbatch-") as folder:
            yield Path(folder) / path.name
        return
    # Of this process and this call alone, whoever else writes the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}{PARTIAL}")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    finally:
        with suppress(OSError):  # what stopped the writing is what the caller must hear of
            partial.unlink(missing_ok=True)


def commit(partial: Path, path: AnyPath) -> None:
    """Make the finished file `partial` be `path`.

    The bytes reach the disk before the rename, and the rename before the return: after a power loss
    `path` is whole or what it was before. In a store, where a name shows no bytes before it has
    all, it is written by one upload.
    """
    with writable(path):
        if isinstance(path, ObjectPath):
            path.upload(partial)
            return
        sync(partial)
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # an empty folder in its place holds nothing of anybody
                path.rmdir()
        os.replace(partial, path)
        sync(path.parent)  # the name itself is in the folder


def move(source: AnyPath, path: AnyPath) -> None:
    """Make the committed file `source` be `path`, on the same disk or in the same store.

    In a store the first name stays.
    """
    if isinstance(path, ObjectPath) and isinstance(source, ObjectPath):
        path.copy_from(source)
    elif isinstance(source, Path):
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        commit(source, path)


def modified(path: AnyPath) -> float:
    """When `path` was written last, in seconds."""
    return path.modified().timestamp() if isinstance(path, ObjectPath) else path.stat().st_mtime


def remove_tree(folder: AnyPath) -> None:
    """Remove all below `folder`, as far as that can be done."""
    if isinstance(folder, ObjectPath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def committed(address: Address) -> Iterator[Path]:
    """Give a name to write to; it becomes the file `address` at the end, if nothing failed.

    Errors of writing are ours, as `writable` has them.
    """
    with partial_beside(address) as partial:
        with writable(address):
            yield partial
        commit(partial, location(address))


def sync(path: Path) -> None:
    """Have what was written to the file or folder `path` reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def reachable(path: Address) -> Iterator[None]:
    """Turn the system's errors of reading or listing `path` into ours; that it is gone stays."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{path}: cannot be read now: {reason}.") from error
        raise InputError(f"{path}: cannot be read: {reason}. Set data.output.") from error


@contextmanager
def writable(path: Address) -> Iterator[None]:
    """Turn the system's errors of writing `path` into ours."""
    try:
        with naming("data.output"):
            yield
    except OSError as error:
        reason = (
            str(error) if error.errno is None else os.strerror(error.errno)
        )  # Arrow's own text is three lines
        if error.errno in UNWRITABLE or isinstance(error, FileExistsError | FileNotFoundError):
            way = (
                "Remove what stands in its place, or else: Set" if error.errno in BLOCKED else "Set"
            )
            raise InputError(f"{path}: cannot be written: {reason}. {way} data.output.") from error
        raise TransientError(f"{path}: cannot be written: {reason}.") from error
