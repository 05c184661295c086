"""Whose fault an error of a file or a store is: the caller's, to mend, or the machine's, to pass.

What a store's own package (s3fs, gcsfs, adlfs) raises becomes ours:

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

# Writing fails by what only the caller can mend; any other error of writing may pass by itself.
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
# Timeout, conflict of two writers, too many requests: these pass by themselves, as does all from
# 500 on.
PASSING_STATUS = frozenset({408, 409, 425, 429})
CHANGED_STATUS = 412  # what a read on condition says when other bytes are there now
EXISTS_STATUS = frozenset(
    {409, CHANGED_STATUS}
)  # what a conditional create says when it comes second
NOT_IMPLEMENTED = 501


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # in what deltalake says


def one_line(error: BaseException, limit: int = 200) -> str:
    """The text of an error on one line, without its full stop; its class where it has no text."""
    plain = "".join(
        character
        for character in _COLOURS.sub("", str(error))
        if character.isprintable() or character.isspace()
    )
    text = " ".join(plain.split()) or type(error).__name__
    return text[:limit].rstrip(".")


@contextmanager
def store_errors(path: PurePath) -> Iterator[None]:
    """Turn what a store's package raises into ours; FileNotFoundError and FileExistsError stay."""
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
                "credentials and region in "
                "the environment."
            ) from error
        raise


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, if there is one."""
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
    """What happened, in a word or two: the package's text may hold more than a log should."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    return (
        str(response["Error"].get("Code")) if isinstance(response, dict) else type(cause).__name__
    )


@lru_cache
def _passing() -> tuple[type[Exception], ...]:
    """What the packages that are here raise when a connection fails."""
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
    """What they raise without credentials, or with settings of their own that cannot be used."""
    kinds: list[type[Exception]] = []
    with suppress(ImportError):
        from botocore.exceptions import BotoCoreError

        kinds.append(BotoCoreError)
    with suppress(ImportError):
        from google.auth.exceptions import GoogleAuthError

        kinds.append(GoogleAuthError)
    return tuple(kinds)
