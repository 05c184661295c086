"""File modes of what is written: users who may not read its sources may not read it either.

Only the modes of files are changed; those of folders are up to their owner. A store has its own
access control.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from glmbatch.store.paths import Address, AnyPath, location

logger = logging.getLogger(__name__)


def narrow(path: AnyPath, sources: Iterable[Address]) -> None:
    """Remove access to `path` for the group and for others if any of `sources` does not allow it.

    The group keeps access if a source allows its group to read and both files have the same group.
    Never adds access. Ignores missing sources. Logs a warning if `path` belongs to another user.
    """
    if not isinstance(path, Path):
        return
    status = path.stat()
    taken = 0
    for source in {str(source) for source in sources}:
        taken |= _not_given(location(source), status.st_gid)
    mode = stat.S_IMODE(status.st_mode)
    if mode & taken:
        try:
            os.chmod(path, mode & ~taken)
        except PermissionError:  # another user owns the file
            logger.warning("%s: more users may read it than its sources", path)


def _not_given(source: AnyPath, group: int) -> int:
    try:
        status = source.stat() if isinstance(source, Path) else None
    except OSError:
        return 0
    if status is None or status.st_mode & stat.S_IROTH:
        return 0
    if status.st_mode & stat.S_IRGRP and status.st_gid == group:
        return stat.S_IRWXO
    return stat.S_IRWXG | stat.S_IRWXO
