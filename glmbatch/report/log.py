"""The log lines of a run: what it reads, how far it is, the audits and the result."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from glmbatch.errors import counted
from glmbatch.ledger.fragments import FileFault, Plan, bundle_name
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.ledger.staying import filtered
from glmbatch.report.counts import Audit
from glmbatch.report.progress import Progress, Snapshot
from glmbatch.report.summary import StepSummary, Summary, short, step_summary
from glmbatch.report.text import LEFT_OUT_SHOWN

logger = logging.getLogger(__name__)

BUNDLES_SHOWN = 20
SECONDS_APART = 10.0
FAILURES_SHOWN = 5


def log_plan(plan: Plan) -> None:
    """Log how many rows there are, and which files are left out."""
    files = len({fragment.source for fragment in plan.fragments})
    logger.info(
        "%s: %s of %s in %s; unchanged files: %s; files left out: %s",
        *(plan.root, counted(plan.rows, "row"), counted(files, "file")),
        *(counted(len(plan.fragments), "fragment"), f"{len(plan.unchanged):,}"),
        len(plan.unusable),
    )
    if plan.version is not None:
        logger.info("reads %s", plan.version)
    if plan.where is not None:
        logger.info("where %s", filtered(plan))
    for source in plan.silent[:LEFT_OUT_SHOWN]:
        logger.warning("%s: has other bytes under the same size and times; read again", source)
    _log_left_out(plan.unusable)


class AnswersLog:
    """The lines about the answers of `run`, so few that a run of any size can be read.

    The first bundles have a line each. After them there is a line for each percent of the run's
    `progress`, and none within SECONDS_APART of the last one. Thread-safe.
    """

    def __init__(self, run: str, progress: Progress) -> None:
        self._run = run
        self._progress = progress
        self._lock = threading.Lock()
        self._lines = 0
        self._left_out = 0
        self._faults: Counter[str] = Counter()
        self._percent = 0
        self._logged = 0.0

    def add(self, receipts: Sequence[AnswersReceipt]) -> None:
        """Count, and perhaps log, the answers to one step over one bundle of fragments."""
        answered = [receipt for receipt in receipts if receipt.unusable is None]
        with self._lock:
            for receipt in receipts:
                self._faults.update(receipt.faults)
                if receipt.unusable is not None and self._left_out < LEFT_OUT_SHOWN:
                    self._left_out += 1
                    logger.info(
                        "%s, %s: left out: %s", receipt.step, receipt.fragment, receipt.unusable
                    )
            if not answered:
                return
            if self._lines < BUNDLES_SHOWN:
                self._lines += 1
                self._log_bundle(answered)
            else:
                self._log_progress(self._progress.snapshot())

    def _log_bundle(self, receipts: Sequence[AnswersReceipt]) -> None:
        first = receipts[0]
        name = bundle_name([receipt.fragment for receipt in receipts])
        step = step_summary(first.step, self._run, receipts)
        seconds = f" in {sum(r.seconds for r in receipts):.1f} s" if step.computed else ""
        logger.info("%s, %s: %s%s", first.step, name, _counts(step), seconds)
        self._logged = time.monotonic()

    def _log_progress(self, now: Snapshot) -> None:
        # An engine process of a cluster does not know the total; the flow's process logs there.
        percent = 100 * now.done // now.total if now.total else 0
        if percent <= self._percent or time.monotonic() - self._logged < SECONDS_APART:
            return
        self._percent = percent
        self._logged = time.monotonic()
        left = ""
        if now.per_second and now.done < now.total:
            left = (
                f"; at most {timedelta(seconds=int((now.total - now.done) / now.per_second))} left"
            )
        logger.info(
            "%s of %s answers (%s%%): %s by the model, %.0f a second; %s failed%s%s",
            *(f"{now.done:,}", f"{now.total:,}", percent, f"{now.computed:,}", now.per_second),
            f"{self._faults.total():,}",
            f" ({_reasons(dict(self._faults.most_common()))})" if self._faults else "",
            left,
        )


def log_audits(audits: Sequence[Audit]) -> None:
    """Log what each audit measured and whether it passed."""
    for audit in audits:
        logger.info("audit %s: %s", "passed" if audit.passed else "failed", audit)


def log_end(summary: Summary, failures: Sequence[Mapping[str, Any]] = ()) -> None:
    """Log the totals of each step, the first failed rows, and what was published or why nothing.

    `failures` are as in the list of failed rows.
    """
    for step in summary.steps:
        logger.info("%s, total: %s", step.name, _counts(step))
    rows = [failure for failure in failures if failure.get("row") is not None]
    for failure in rows[:FAILURES_SHOWN]:
        where = f"{failure['source']}: row {failure['row']}"
        if "step" in failure:  # no step fails on a row that is damaged
            where += f", {failure['step']}"
        logger.info("failed: %s: %s", where, short(failure["error"], 200))
    if len(rows) > FAILURES_SHOWN:
        more = counted(len(rows) - FAILURES_SHOWN, "more failure")
        logger.info("failed: %s; the list of failed rows has them all", more)
    if summary.refused is not None:
        logger.info("%s", summary.refused)
        return
    logger.info(
        "%s: published %s in %s; %s failed, files or fragments left out: %s, "
        "sources of earlier runs kept: %s, in %.1f s",
        *(summary.output, counted(summary.rows, "row"), counted(summary.fragments, "file")),
        *(f"{summary.faulty_rows:,}", len(summary.unusable), summary.kept_sources),
        summary.seconds,
    )


def _log_left_out(faults: Sequence[FileFault]) -> None:
    for fault in faults[:LEFT_OUT_SHOWN]:
        logger.info("%s: left out: %s", fault.source, short(fault.reason, 300))
    if len(faults) > LEFT_OUT_SHOWN:
        logger.info("also left out: %s", counted(len(faults) - LEFT_OUT_SHOWN, "more file"))


def _counts(step: StepSummary) -> str:
    line = (
        f"{counted(step.answers, 'row')}, {step.computed:,} answered by the model, "
        f"{step.reused:,} reused, {step.repeated:,} repeated, {step.failed:,} failed"
    )
    line = f"{line} ({_reasons(step.faults)})" if step.faults else line
    others = {"not asked": step.not_asked, "abstained": step.abstained}
    others["without a label"] = step.unlabelled
    for what, count in others.items():
        line += f", {count:,} {what}" if count else ""
    return line


def _reasons(faults: Mapping[str, int]) -> str:
    reasons: Iterable[str] = (f"{reason} {rows:,}" for reason, rows in faults.items())
    return ", ".join(reasons)
