"""What glmbatch logs, shown on the page of the flow run and in its task runs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

OURS = logging.getLogger("glmbatch")


class _PageHandler(APILogHandler):
    """Sends records to the page of one flow run; those of other runs in this process are not its.

    Prefect's own handler finds the run by the thread, and the engine's threads belong to none.
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
    """Within the block, what glmbatch does is told on the page of the flow run under way."""
    handler = _PageHandler(str(flow_run.id))
    level = OURS.level
    OURS.addHandler(handler)
    OURS.setLevel(min(OURS.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        OURS.setLevel(level)
        OURS.removeHandler(handler)
        handler.flush()  # the server of this run alone ends with it
