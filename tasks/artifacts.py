"""The artifacts on the page of a flow run: its progress and the facts of its report.

An artifact that cannot be written is logged as a warning and never fails a run.
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

from glmbatch.report.facts import errors_by_reason
from glmbatch.report.markdown import markdown
from glmbatch.report.report import read_report
from glmbatch.store.files import real_path

logger = logging.getLogger(__name__)

# Each update is a request to the server, and a run may have thousands of fragments.
UPDATE_SECONDS = 5.0


class FragmentProgress:
    """The progress artifact of the flow run, in percent of `total` fragments."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._updated = time.monotonic()
        self._artifact: Any = None  # stays None if the server refuses it
        with _optional():
            self._artifact = create_progress_artifact(
                0.0, key="annotate-progress", description=self._described()
            )

    def add(self, fragments: int) -> None:
        """Count finished fragments. The page is updated every UPDATE_SECONDS and at the end."""
        self._done += fragments
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
    """Show the facts and errors of `run` and a link to its report; nothing if it has no report."""
    report = read_report(output, run)
    if report is None or report.summary.report is None:
        return
    errors = []
    for step, reason, rows in errors_by_reason(report.summary):
        errors.append({"step": step, "reason": reason, "rows": rows})
    with _optional():
        # Keys are fixed, because the UI shows all artifacts with the same key as a history.
        create_markdown_artifact(markdown(report), key="annotate", description=f"run {run}")
        create_table_artifact(errors, key="annotate-errors", description="errors by reason")
        create_link_artifact(
            _url_of(report.summary.report),
            "the report of the run",
            key="annotate-report",
            description=report.summary.report,
        )


def _url_of(address: str) -> str:
    """A URL with which a browser can open the file `address`."""
    path = real_path(address)
    return path.as_uri() if isinstance(path, Path) else str(path)


@contextmanager
def _optional() -> Iterator[None]:
    try:
        yield
    except (PrefectException, httpx.HTTPError) as error:
        logger.warning("could not update the page of the flow run: %s", error)
