"""What stands on the page of a flow run beside its tasks: how far it is, and what it did.

What cannot be shown is a warning: no run fails by it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

from glmbatch.report.report import errors_by_reason, markdown, read_report
from glmbatch.run.planning import Run
from glmbatch.settings.job import JobConfig
from glmbatch.store.paths import location

logger = logging.getLogger(__name__)

UPDATE_SECONDS = 5.0


class FragmentProgress:
    """A progress artifact of the flow run, in percent of `total` fragments; it moves at most every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._updated = time.monotonic()
        self._artifact: Any = None
        with _optional():
            self._artifact = create_progress_artifact(
                0.0, key="annotate-progress", description=self._described()
            )

    def add(self) -> None:
        """Count one fragment as finished."""
        self._done += 1
        now = time.monotonic()
        if self._artifact is None or (
            self._done < self._total and now - self._updated < UPDATE_SECONDS
        ):
            return
        self._updated = now
        with _optional():
            update_progress_artifact(
                self._artifact, 100.0 * self._done / self._total, self._described()
            )

    def _described(self) -> str:
        return f"{self._done} of {self._total} fragments"


def show_report(job: JobConfig, run: Run) -> None:
    """The facts of `run`, its errors, and the place of its page; nothing where it has no report."""
    report = read_report(job.data.output, run.id)
    if report is None or report.summary.report is None:
        return
    errors = [
        {"step": step, "reason": reason, "rows": rows}
        for step, reason, rows in errors_by_reason(report)
    ]
    with _optional():
        create_markdown_artifact(markdown(report), key="annotate", description=f"run {run.id}")
        create_table_artifact(errors, key="annotate-errors", description="errors by reason")
        page = location(report.summary.report).resolve()
        address = page.as_uri() if isinstance(page, Path) else str(page)
        create_link_artifact(
            address,
            "the report of the run",
            key="annotate-report",
            description=report.summary.report,
        )


@contextmanager
def _optional() -> Iterator[None]:
    try:
        yield
    except (PrefectException, httpx.HTTPError) as error:
        logger.warning("not shown on the page of the run: %s", error)
