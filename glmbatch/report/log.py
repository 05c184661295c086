"""The log lines of a run: what it reads, each fragment, the audits and the result."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from glmbatch.errors import counted
from glmbatch.ledger.fragments import FileFault, Plan, bundle_name
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report.counts import Audit
from glmbatch.report.summary import StepSummary, Summary, short, step_summary
from glmbatch.report.text import LEFT_OUT_SHOWN

logger = logging.getLogger(__name__)


def log_plan(plan: Plan) -> None:
    """Log how many rows there are, and which files are left out."""
    files = len({fragment.source for fragment in plan.fragments})
    logger.info(
        "%s: %s of %s in %s; unchanged files: %s; files left out: %s",
        *(plan.root, counted(plan.rows, "row"), counted(files, "file")),
        *(counted(len(plan.fragments), "fragment"), f"{len(plan.unchanged):,}"),
        len(plan.unusable),
    )
    for source in plan.silent[:LEFT_OUT_SHOWN]:
        logger.warning("%s: has other bytes under the same size and times; read again", source)
    _log_left_out(plan.unusable)


def log_answers(receipts: Sequence[AnswersReceipt], run: str) -> None:
    """Log the result of one step over one bundle of fragments, as seen by `run`."""
    answered = []
    for receipt in receipts:
        if receipt.unusable is None:
            answered.append(receipt)
        else:
            logger.info("%s, %s: left out: %s", receipt.step, receipt.fragment, receipt.unusable)
    if not answered:
        return
    first = answered[0]
    name = bundle_name([receipt.fragment for receipt in answered])
    step = step_summary(first.step, run, answered)
    seconds = f" in {sum(r.seconds for r in answered):.1f} s" if step.computed else ""
    logger.info("%s, %s: %s%s", first.step, name, _counts(step), seconds)


def log_audits(audits: Sequence[Audit]) -> None:
    """Log what each audit measured and whether it passed."""
    for audit in audits:
        logger.info("audit %s: %s", "passed" if audit.passed else "failed", audit)


def log_end(summary: Summary) -> None:
    """Log the totals of each step, and what was published or why nothing was."""
    for step in summary.steps:
        logger.info("%s, total: %s", step.name, _counts(step))
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
