"""Files by name, on this machine or in a store: finding inputs, committing outputs, digests.

Knows nothing of what is in a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from glmbatch.errors import InputError, StoreRefused, TransientError
from glmbatch.store.errors import UNWRITABLE, store_errors
from glmbatch.store.paths import GLOB_MARKS, Address, AnyPath, ObjectPath, location

PARTIAL = ".partial"
# Something else stands where a file or a folder is to be.
BLOCKED = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY})


def find_files(pattern: str) -> tuple[AnyPath, list[str]]:
    """The folder that the matching files are named from, and their sorted POSIX paths below it.

    A folder stands for every `.parquet` file below it. Names that start with a dot or an underscore
    are skipped, as Arrow, Spark and DuckDB skip them, and links to folders are not followed. Files
    are named from above the partition folders (`day=1`), so a run over one day names them as a run
    over all days does. InputError when nothing matches.
    """
    with naming("data.input"):
        root, names = _find(location(pattern), pattern)
    # From above the partition folders: a run over one day names files as one over all days does.
    while "=" in root.name:
        names = [f"{root.name}/{name}" for name in names]
        root = root.parent
    return root, sorted(set(names))


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Add to what a store refuses which `setting` led there."""
    try:
        yield
    except StoreRefused as error:
        raise StoreRefused(f"{error} Or set {setting}.") from error


def _find(whole: AnyPath, pattern: str) -> tuple[AnyPath, list[str]]:
    root: AnyPath
    if whole.is_file():
        return whole.parent, [whole.name]
    if whole.is_dir():
        root, names = whole, _parquet_below(whole, whole)
    elif GLOB_MARKS & set(pattern):
        root, names = _matches(whole)
    else:
        origin = f" (from {Path.cwd()})" if isinstance(whole, Path) else ""
        raise InputError(f"{pattern}: no such file or folder{origin}. Set data.input.")
    if not names:
        raise InputError(
            f"{pattern}: no Parquet file matches (hidden and _underscore names are skipped). Set "
            "data.input."
        )
    return root, names


def _matches(pattern: AnyPath) -> tuple[AnyPath, list[str]]:
    fixed = len(_leading_plain_parts(pattern))
    root = type(pattern)(*pattern.parts[:fixed]) if fixed else Path()
    if not root.is_dir():
        raise InputError(f"{pattern}: there is no folder {root}. Set data.input.")
    rest = "/".join(pattern.parts[fixed:])
    if isinstance(root, ObjectPath):
        return root, _objects_matching(root, rest)
    names: list[str] = []
    try:
        matches = list(root.glob(rest))
    except ValueError as error:
        raise InputError(f"{pattern}: {error}. Set data.input.") from error
    for match in matches:
        if match.is_dir():
            names += _parquet_below(root, match)
        elif not _is_hidden(match.relative_to(root)):
            names.append(match.relative_to(root).as_posix())
    return root, names


def _objects_matching(root: ObjectPath, pattern: str) -> list[str]:
    """Objects that `pattern` names, and those with a Parquet name below a folder that it names."""
    # A pattern that ends in ** names folders alone, as pathlib has it.
    paths = [] if pattern.endswith("**") else list(root.glob(pattern))
    paths += root.glob(f"{pattern}/**/*.parquet")
    names = [path.relative_to(root) for path in paths]
    return [str(name) for name in names if not _is_hidden(name)]


def _leading_plain_parts(pattern: PurePath) -> list[str]:
    plain: list[str] = []
    for part in pattern.parts:
        if GLOB_MARKS & set(part):
            break
        plain.append(part)
    return plain


def _parquet_below(root: AnyPath, folder: AnyPath) -> list[str]:
    names: list[str] = []
    if isinstance(folder, ObjectPath):
        names += [str(path.relative_to(root)) for path in folder.rglob("*.parquet")]
    else:
        for parent, folders, files in os.walk(folder, onerror=_refuse_folder):
            # In place, which keeps os.walk out of hidden folders.
            folders[:] = [name for name in folders if name[0] not in "._"]
            for name in files:
                if name.endswith(".parquet"):
                    names.append((Path(parent) / name).relative_to(root).as_posix())
    return [name for name in names if not _is_hidden(Path(name))]


def _refuse_folder(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: the folder cannot be read: {error.strerror}. Set data.input."
    ) from error


def _is_hidden(path: PurePath) -> bool:
    return any(part[0] in "._" for part in path.parts)


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
