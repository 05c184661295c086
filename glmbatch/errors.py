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


class GlmbatchError(Exception):
    """Any error that glmbatch raises on purpose."""


class InputError(GlmbatchError):
    """The caller must change something; trying again gives the same error."""


class UnusableFile(InputError):
    """One Parquet file, or one fragment of it, cannot be read or does not fit the job."""


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
