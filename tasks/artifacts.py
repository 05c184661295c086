"""What the page of a flow run shows beside its tasks: the progress, and the facts of the report.

An artifact that cannot be written is a warning in the log. No run fails by it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

from glmbatch.report.facts import errors_by_reason
from glmbatch.report.markdown import markdown
from glmbatch.report.report import read_report
from glmbatch.store.files import url_of

logger = logging.getLogger(__name__)

# Each update is a request to the server, and a night may have thousands of fragments.
UPDATE_SECONDS = 5.0


class FragmentProgress:
    """A progress artifact of the flow run, in percent of `total` fragments."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._updated = time.monotonic()
        self._artifact: Any = None  # stays None where the server did not take it
        with _optional():
            self._artifact = create_progress_artifact(
                0.0, key="annotate-progress", description=self._described()
            )

    def add(self) -> None:
        """Count a fragment as finished; the page follows after UPDATE_SECONDS, or at the end."""
        self._done += 1
        if self._artifact is None:
            return
        now = time.monotonic()
        if self._done < self._total and now - self._updated < UPDATE_SECONDS:
            return
        self._updated = now
        with _optional():
            update_progress_artifact(
                self._artifact, 100.0 * self._done / self._total, self._described()
            )

    def _described(self) -> str:
        return f"{self._done} of {self._total} fragments"


def show_report(output: str, run: str) -> None:
    """Show the facts of `run`, its errors, and a link to its page; nothing without a report."""
    report = read_report(output, run)
    if report is None or report.summary.report is None:
        return
    errors = []
    for step, reason, rows in errors_by_reason(report.summary):
        errors.append({"step": step, "reason": reason, "rows": rows})
    with _optional():
        # Keys are fixed: the artifacts of all runs under one key are a history in the UI.
        create_markdown_artifact(markdown(report), key="annotate", description=f"run {run}")
        create_table_artifact(errors, key="annotate-errors", description="errors by reason")
        create_link_artifact(
            url_of(report.summary.report),
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
