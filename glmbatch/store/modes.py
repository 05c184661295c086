"""Who may read what is written: nobody who may not read what it was made of.

By the rights of files alone; those of folders are their owner's to set. A store has rights of its
own.
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
    """Take from `path` the rights of its group and of others that any of `sources` does not give.

    A right of a group counts where both belong to the same group. Gives no right; a source that is
    gone says nothing.
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
        except PermissionError:  # somebody else's, who decides
            logger.warning("%s: may be read by more people than what it was made of", path)


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
