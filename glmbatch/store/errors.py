"""Sort errors of files and stores: those that the caller must fix, and those that may pass.

Errors of a store's own package (s3fs, gcsfs, adlfs) become ours:

    FileNotFoundError, FileExistsError    as pathlib raises them
    StoreRefused                          denied, no credentials, another region
    TransientError                        5xx, too many requests, timeouts, broken connections
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePath

from glmbatch.errors import StoreRefused, TransientError

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
CHANGED_STATUS = 412  # a conditional read found that the object has changed
EXISTS_STATUS = frozenset({409, CHANGED_STATUS})  # a conditional create found an object
NOT_IMPLEMENTED = 501


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


@contextmanager
def store_errors(path: PurePath) -> Iterator[None]:
    """Turn errors of a store's package into ours, with `path` in the message.

    Raises TransientError if the error may pass and StoreRefused if the store refuses the access.
    Does not change FileNotFoundError, FileExistsError, or errors about a local path.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, StoreRefused, TransientError):
        raise
    except Exception as error:
        if isinstance(path, Path):
            raise
        status = status_of(error)
        if isinstance(error, _passing()) or (
            status is not None and (status >= 500 or status in PASSING_STATUS)
        ):
            raise TransientError(
                f"{path}: the store cannot be reached now ({_reason(error)})."
            ) from error
        if isinstance(error, (PermissionError, *_refusing())) or status is not None:
            raise StoreRefused(
                f"{path}: the store refuses it ({_reason(error)}). Check the address, and "
                "credentials and region in the environment."
            ) from error
        raise


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status in an error or its causes; None without one."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        for name in ("status_code", "code", "status"):
            if isinstance(status := getattr(error, name, None), int):
                return status
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    """The error's code or class; never its text, which may contain secrets."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    return (
        str(response["Error"].get("Code")) if isinstance(response, dict) else type(cause).__name__
    )


@lru_cache
def _passing() -> tuple[type[Exception], ...]:
    """The errors that the installed packages raise when a connection fails."""
    kinds: list[type[Exception]] = [ConnectionError, TimeoutError]
    with suppress(ImportError):
        from aiohttp import ClientError

        kinds.append(ClientError)
    with suppress(ImportError):
        from botocore.exceptions import ConnectionError as Unconnected
        from botocore.exceptions import HTTPClientError

        kinds += [Unconnected, HTTPClientError]
    with suppress(ImportError):
        from azure.core.exceptions import ServiceRequestError, ServiceResponseError

        kinds += [ServiceRequestError, ServiceResponseError]
    return tuple(kinds)


@lru_cache
def _refusing() -> tuple[type[Exception], ...]:
    """The errors that they raise without credentials, or if their own settings are not usable."""
    kinds: list[type[Exception]] = []
    with suppress(ImportError):
        from botocore.exceptions import BotoCoreError

        kinds.append(BotoCoreError)
    with suppress(ImportError):
        from google.auth.exceptions import GoogleAuthError

        kinds.append(GoogleAuthError)
    return tuple(kinds)
