"""Files by name: finding inputs, committing outputs, digests. Local paths; knows nothing of what is in a file."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glmbatch.errors import InputError, TransientError

PARTIAL = ".partial"
GLOB_MARKS = frozenset("*?[")
# The output is at fault, and only the caller can mend it; anything else of the system may pass by itself.
UNWRITABLE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
)


def find_files(pattern: str) -> tuple[Path, list[str]]:
    """The folder that the matching files are named from, and their sorted POSIX paths below it.

    A folder stands for every `.parquet` file below it. Names that start with a dot or an underscore are skipped, as
    Arrow, Spark and DuckDB skip them, and links to folders are not followed. Files are named from above the partition
    folders (`day=1`), so a run over one day names them as a run over all days does. InputError when nothing matches.
    """
    root, names = _find(Path(pattern), pattern)
    while "=" in root.name:
        root, names = root.parent, [f"{root.name}/{name}" for name in names]
    return root, sorted(set(names))


def _find(whole: Path, pattern: str) -> tuple[Path, list[str]]:
    if whole.is_file():
        return whole.parent, [whole.name]
    if whole.is_dir():
        root, names = whole, _parquet_below(whole, whole)
    elif GLOB_MARKS & set(pattern):
        root, names = _matches(whole)
    else:
        raise InputError(f"{pattern}: no such file or folder (from {Path.cwd()}). Set data.input.")
    if not names:
        raise InputError(
            f"{pattern}: no Parquet file matches (hidden and _underscore names are skipped). Set data.input."
        )
    return root, names


def _matches(pattern: Path) -> tuple[Path, list[str]]:
    fixed = len(_leading_plain_parts(pattern))
    root = Path(*pattern.parts[:fixed]) if fixed else Path()
    if not root.is_dir():
        raise InputError(f"{pattern}: there is no folder {root}. Set data.input.")
    names: list[str] = []
    try:
        matches = list(root.glob(str(Path(*pattern.parts[fixed:]))))
    except ValueError as error:
        raise InputError(f"{pattern}: {error}. Set data.input.") from error
    for match in matches:
        if match.is_dir():
            names += _parquet_below(root, match)
        elif not _is_hidden(match.relative_to(root)):
            names.append(match.relative_to(root).as_posix())
    return root, names


def _leading_plain_parts(pattern: Path) -> list[str]:
    plain: list[str] = []
    for part in pattern.parts:
        if GLOB_MARKS & set(part):
            break
        plain.append(part)
    return plain


def _parquet_below(root: Path, folder: Path) -> list[str]:
    names: list[str] = []
    for here, folders, files in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if name[0] not in "._"]
        names += [(Path(here) / name).relative_to(root).as_posix() for name in files if name.endswith(".parquet")]
    return [name for name in names if not _is_hidden(Path(name))]


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: the folder cannot be read: {error.strerror}. Set data.input.") from error


def _is_hidden(path: Path) -> bool:
    return any(part[0] in "._" for part in path.parts)


def digest_file(path: Path) -> str:
    """SHA-256 of the bytes of `path`, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def partial_beside(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; whatever is left there at the end is removed.

    The name starts with a dot, so no reader takes it for data.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}{PARTIAL}")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    finally:
        with suppress(OSError):  # what stopped the writing is what the caller must hear of
            partial.unlink(missing_ok=True)


def commit(partial: Path, path: Path) -> None:
    """Make the finished file `partial` be `path`.

    The bytes reach the disk before the rename, and the rename before the return: after a power loss `path` is whole
    or what it was before.
    """
    with writable(path):
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


@contextmanager
def committed(path: Path) -> Iterator[Path]:
    """Give a name to write to; at the end, and only if nothing failed, it becomes `path`."""
    with partial_beside(path) as partial:
        yield partial
        commit(partial, path)


def sync(path: Path) -> None:
    """Have what was written to the file or folder `path` reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn the system's errors of writing `path` into ours."""
    try:
        yield
    except OSError as error:
        reason = str(error) if error.errno is None else os.strerror(error.errno)  # Arrow's own text is three lines
        if error.errno in UNWRITABLE or isinstance(error, FileExistsError):
            raise InputError(f"{path}: cannot be written: {reason}. Set data.output.") from error
        raise TransientError(f"{path}: cannot be written: {reason}.") from error
