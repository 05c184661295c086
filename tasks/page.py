"""Sends the log of glmbatch to the pages of the flow run and its task runs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

OURS = logging.getLogger("glmbatch")


class _PageHandler(APILogHandler):
    """Sends the records of one flow run to its page; skips those of other runs in this process.

    Prefect's own handler finds the run by thread, but the engine's threads belong to no run.
    """

    def __init__(self, run: str) -> None:
        super().__init__(logging.INFO)
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        of_thread = flow_run.id
        if of_thread is None:
            record = copy.copy(record)
            record.flow_run_id = self._run
        elif of_thread != self._run:
            return
        super().emit(record)


@contextmanager
def logged_on_page() -> Iterator[None]:
    """Within the block, the page of the current flow run shows the log of glmbatch."""
    handler = _PageHandler(str(flow_run.id))
    level = OURS.level
    OURS.addHandler(handler)
    OURS.setLevel(min(OURS.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        OURS.setLevel(level)
        OURS.removeHandler(handler)
        handler.flush()  # a server started for this run stops after it
