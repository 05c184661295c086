"""The exceptions that a caller can get. Knows nothing of Prefect, files or tensors.

    GlmbatchError
    ├── InputError          the caller must change something; never retried
    │   ├── UnusableFile    a Parquet file or fragment cannot be read or does not match the job
    │   ├── BadRow          a row cannot be processed and on_error is "raise"
    │   └── StoreRefused    an object store refused: no credentials, no permission, another region
    ├── TransientError      the machine failed; the same call may succeed later; retried
    │   └── OutOfMemory     the device has too little memory for the weights
    ├── DeviceLost          the GPU failed, and only a new process can use it; not retried
    ├── Interrupted         the run was asked to stop; the next run resumes
    └── AuditError          the answers failed an audit and were not published

A message is one line that says where, what was seen, and which setting to change.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache

# Errors of a disk or a network file system after which the same call may succeed later.
MACHINE_ERRNOS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ECONNRESET,
        errno.ENOTCONN,
    }
)


# Control characters, line breaks, marks that reverse text, and bytes of a name that is not UTF-8.
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SHOWN_NAMES = 5
SHOWN_CHARS = 120


def shown(name: object) -> str:
    """`name` on one line, with everything escaped that a terminal or a log could not show."""

    def escaped(match: re.Match[str]) -> str:
        code = ord(match.group())
        if 0xDC80 <= code <= 0xDCFF:  # how Python stores a byte that is not UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return match.group().encode("unicode_escape", "surrogatepass").decode()

    return UNSHOWN.sub(escaped, str(name))


def counted(number: int, noun: str) -> str:
    """`number` with `noun`, for example "1 file" or "2,000 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some_of(names: Sequence[object], near: str = "") -> str:
    """`names` for a message: all of them if they are short, else the count and a few.

    The few are those most like `near`, or the first ones.
    """
    return _some_of(tuple(shown(name) for name in names), near)


@lru_cache(64)
def _some_of(names: tuple[str, ...], near: str) -> str:
    """Cached, because a thousand files of a folder usually have the same columns."""
    whole = str(list(names))
    if len(whole) <= SHOWN_CHARS:
        return whole
    folded = {name.casefold(): name for name in reversed(names)}
    close = get_close_matches(near.casefold(), folded, SHOWN_NAMES, cutoff=0.5) if near else []
    few = [folded[name] for name in close] or list(names[:SHOWN_NAMES])
    room = SHOWN_CHARS // len(few)
    cut = [name if len(name) <= room else f"{name[: room - 1]}…" for name in few]
    what = "the closest" if close else "the first"
    return f"{len(names):,} names, {what} {cut}"


class GlmbatchError(Exception):
    """Any error that glmbatch raises on purpose."""


class InputError(GlmbatchError):
    """The caller must change something; retrying gives the same error."""


class UnusableFile(InputError):
    """One Parquet file, or one fragment of it, cannot be read or does not match the job.

    `rows` is the number of rows in the file, or None if its footer cannot be read.
    """

    rows: int | None = None


class BadRow(InputError):
    """A row cannot be processed and the job sets `on_error: raise`."""


class StoreRefused(InputError):
    """An object store refused a request, and would refuse it again."""


class TransientError(GlmbatchError):
    """The machine failed; retrying the same call may succeed."""


class OutOfMemory(TransientError):
    """The device has too little memory for the weights; other programs may free some later."""


class DeviceLost(GlmbatchError):
    """The GPU failed in a way that ends its use in this process; a new process may use it."""


class Interrupted(GlmbatchError):
    """The run was asked to stop; committed answers stay, and the next run resumes from them."""


class AuditError(GlmbatchError):
    """The run's answers failed an audit; nothing was published."""
