"""Sort errors of files and stores: those that the caller must fix, and those that may pass.

Errors of the stores' clients, obstore and boto3, become ours:

    FileNotFoundError, FileExistsError    as pathlib raises them
    StoreRefused                          denied, no credentials, another region, another version
    TransientError                        5xx, too many requests, timeouts, broken connections
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from glmbatch.errors import GlmbatchError, StoreRefused, TransientError, shown

# Errors of writing that only the caller can fix; any other one may pass.
UNWRITABLE = frozenset(
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    }
)
# HTTP status codes that may pass: timeout, write conflict, too early, too many requests. So may all
# from 500 on.
PASSING_STATUS = frozenset({408, 409, 425, 429})
MISSING_STATUS = 404
NO_SUCH_RANGE = 416
NOT_IMPLEMENTED = 501
# obstore has types for the errors about one object. For all others it has one type, and the
# status stands only in the text that it gives every answer.
_STATUS = re.compile(r"non-2xx status code: (\d{3})\b")

ENDINGS_READ = (
    "labelled rows must be Parquet, and other rows may end in .csv, .tsv, .jsonl or .ndjson too"
)
# How pyarrow says that a file, which may be short, does not end as Parquet does.
NOT_PARQUET = re.compile(r"Parquet magic bytes not found|Parquet file size is \d+ bytes, smaller")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # deltalake colours its messages


def one_line(error: BaseException, limit: int = 200) -> str:
    """The text of an error on one line without its full stop, or its class if it has no text.

    At most `limit` characters, without colours and other unprintable characters.
    """
    plain = "".join(
        character
        for character in _COLOURS.sub("", str(error))
        if character.isprintable() or character.isspace()
    )
    text = " ".join(plain.split()) or type(error).__name__
    return text[:limit].rstrip(".")


def unread(path: PurePath, form: str, error: BaseException) -> str:
    """Why the file `path` cannot be read as `form`, without a full stop at the end."""
    ending = path.suffix
    if NOT_PARQUET.search(str(error)) and ending.casefold() not in ("", ".parquet"):
        return f"is not Parquet, and the ending {shown(ending)} is not read; {ENDINGS_READ}"
    return f"not readable as {form}: {one_line(error)}"


@contextmanager
def store_errors(path: PurePath) -> Iterator[None]:
    """Turn errors of a store's client into ours, with `path` in the message.

    Raises TransientError if the error may pass and StoreRefused if the store refuses the access.
    FileNotFoundError and FileExistsError are as pathlib raises them. Does not change errors about
    a local path.
    """
    try:
        yield
    except GlmbatchError:
        raise
    except Exception as error:
        if isinstance(path, Path) or (isinstance(error, OSError) and error.errno is not None):
            raise
        ours = _ours(path, error)
        if ours is None:
            raise
        raise ours from error


def _ours(path: PurePath, error: Exception) -> Exception | None:
    """Our error for one of a store's client; None for any other error."""
    exceptions = _obstore()
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if exceptions and isinstance(error, exceptions.AlreadyExistsError):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if may_pass(error):
        return TransientError(f"{path}: the store cannot be reached now ({_reason(error)}).")
    if isinstance(error, (PermissionError, *_refusing())) or status_of(error) is not None:
        return StoreRefused(
            f"{path}: the store refuses it ({_reason(error)}). Check the address, and "
            "credentials and region in the environment."
        )
    return None


def may_pass(error: BaseException) -> bool:
    """Whether the same request to a store may succeed later."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in PASSING_STATUS
    return isinstance(error, _passing())


def was_changed(error: BaseException) -> bool:
    """Whether a store refused because the object has another version than was asked for."""
    exceptions = _obstore()
    return bool(exceptions) and isinstance(error.__cause__, exceptions.PreconditionError)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status in an error of a store's client or in its causes; None without one."""
    exceptions = _obstore()
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        if exceptions and isinstance(error, exceptions.GenericError):
            found = _STATUS.search(str(error))
            return int(found[1]) if found else None
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    """The error's code, status or class; never its text, which may contain secrets."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response["Error"].get("Code"))
    status = status_of(error)
    return type(error).__name__ if status is None else f"status {status}"


@lru_cache
def _obstore() -> Any:
    """The errors of obstore; None if it is not installed."""
    try:
        from obstore import exceptions
    except ImportError:
        return None
    return exceptions


@lru_cache
def _passing() -> tuple[type[Exception], ...]:
    """The errors that the installed packages raise when a connection fails."""
    kinds: list[type[Exception]] = [ConnectionError, TimeoutError]
    if _obstore():
        kinds.append(_obstore().GenericError)  # without a status: no answer came
    with suppress(ImportError):
        from botocore.exceptions import ConnectionError as Unconnected
        from botocore.exceptions import HTTPClientError

        kinds += [Unconnected, HTTPClientError]
    return tuple(kinds)


@lru_cache
def _refusing() -> tuple[type[Exception], ...]:
    """The errors that they raise when a store refuses, or if their own settings are unusable."""
    kinds: list[type[Exception]] = []
    if _obstore():
        kinds.append(_obstore().BaseError)
    with suppress(ImportError):
        from botocore.exceptions import BotoCoreError

        kinds.append(BotoCoreError)
    return tuple(kinds)
