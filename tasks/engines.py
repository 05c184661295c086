"""What runs in an engine process of a cluster. Imports no Prefect, which takes each a second."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from glmbatch.errors import DeviceLost
from glmbatch.glm.engine.loading import has_own_process, import_engine
from glmbatch.run.session import join
from glmbatch.run.work import RunContext
from glmbatch.store.locks import shows

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ClusterProcess:
    """The Ray actor: runs the calls of one run in threads that share the loaded engine."""

    def __init__(self, run: RunContext) -> None:
        join(run)
        # While the light processes import Prefect; the first call needs it.
        threading.Thread(target=_prepare, args=(run,), name="import-engine", daemon=True).start()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(*arguments)` here. Ends the process if its GPU failed: Ray starts another."""
        try:
            return function(*arguments)
        except DeviceLost as lost:
            logger.error("%s", lost)
            os._exit(1)


def _prepare(run: RunContext) -> None:
    if not has_own_process(run.runtime):
        import_engine()


def complaint_of(lock: str, sign: str) -> str | None:
    """Why this machine cannot take part: it does not see `sign` in the file `lock`. Else None."""
    if shows(lock, sign):
        return None
    return (
        f"{socket.gethostname()}: does not see the files that {sign} writes to "
        f"{Path(lock).parent.parent}. Put input, output and checkpoints on a file system "
        "that all machines of the cluster share."
    )
