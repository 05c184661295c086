"""The errors a caller can meet. Knows nothing of Prefect, files or tensors.

    GlmbatchError
    ├── InputError          the caller must change something; never retried
    │   ├── UnusableFile    a Parquet file, or a part of it, cannot be read or does not fit the job
    │   ├── BadRow          a row cannot be processed and on_error is "raise"
    │   └── StoreRefused    an object store does not let us: no credentials, denied, another region
    ├── TransientError      the machine failed; the same call may succeed later; retried
    │   └── OutOfMemory     the device has no room for the weights
    ├── Interrupted         the run was told to stop; run again, it goes on
    └── AuditError          the work is done but not fit to be published

A message is one line and says where, what was seen, and which setting to change.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache

# What a disk or a network file system reports when the same call may succeed later.
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


# What would break a line, hide in it or turn it round, and bytes of a name that is not UTF-8.
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SHOWN_NAMES = 5
SHOWN_CHARS = 120


def shown(name: object) -> str:
    """`name` on one line that every terminal, log and file of text can hold."""

    def escaped(match: re.Match[str]) -> str:
        code = ord(match.group())
        if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte that is not UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return match.group().encode("unicode_escape", "surrogatepass").decode()

    return UNSHOWN.sub(escaped, str(name))


def some_of(names: Sequence[object], near: str = "") -> str:
    """`names` as a message lists them: all in short, else how many and those most like `near`."""
    return _some_of(tuple(shown(name) for name in names), near)


@lru_cache(64)
def _some_of(names: tuple[str, ...], near: str) -> str:
    """Kept, since a thousand files of a folder have the same columns."""
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
    """The caller must change something; trying again gives the same error."""


class UnusableFile(InputError):
    """One Parquet file, or one fragment of it, cannot be read or does not fit the job.

    `rows` are those of the file, where its footer tells them.
    """

    rows: int | None = None


class BadRow(InputError):
    """A row cannot be processed and the job says `on_error: raise`."""


class StoreRefused(InputError):
    """An object store does not let us do this to an address, and would not later."""


class TransientError(GlmbatchError):
    """The machine failed; trying the same call again may succeed."""


class OutOfMemory(TransientError):
    """The device has no room for the weights; other programs may leave some later."""


class Interrupted(GlmbatchError):
    """The run was told to stop; what is committed stays, and running again goes on from there."""


class AuditError(GlmbatchError):
    """The run's answers are not fit to be published; nothing was."""
