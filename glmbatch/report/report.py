"""Writes the report of a run: a page for people, and the same facts as JSON.

    OUTPUT/_glmbatch/reports/<run>.html    a self-contained page
    OUTPUT/_glmbatch/reports/<run>.json    the same facts, which the next run compares with its own

Only the newest reports are kept. Any report can be deleted at any time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from pydantic import ValidationError

from glmbatch.errors import GlmbatchError
from glmbatch.report.facts import Report
from glmbatch.report.measures import Measures
from glmbatch.report.page.run import page
from glmbatch.report.summary import Summary
from glmbatch.report.trends import PastRun, past_run
from glmbatch.report.verdict import verdict
from glmbatch.settings.job import JobConfig, RuntimeConfig
from glmbatch.store.files import committed
from glmbatch.store.folder import Folder, by_age, times_written
from glmbatch.store.objects.requests import take_requests
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

REPORTS = "_glmbatch/reports"
KEPT = 30  # a month of nightly runs


def write_report(
    job: JobConfig, summary: Summary, measures: Sequence[Measures], before: str | None
) -> Summary:
    """Write the report of a run, published or refused; return its summary with the page's path.

    The summary also has the requests to object stores until now. `before` is the run that was
    published last. If the report cannot be written, logs a warning, and the summary has no path,
    because a report must not fail a run.
    """
    folder = Folder(job.data.output) / REPORTS
    path = folder / f"{summary.run}.html"
    summary = summary.model_copy(update={"report": str(path), "requests": take_requests()})
    try:
        report = Report(
            input=job.data.input,
            summary=summary,
            measures=tuple(measures),
            models={step.name: job.model_of(step).path for step in job.steps},
            # A run that used no model has not even imported torch.
            device=_device(job.runtime) if summary.computed else None,
            price_per_hour=job.report.price_per_hour,
            price_per_1000_writes=job.report.price_per_1000_writes,
            price_per_1000_reads=job.report.price_per_1000_reads,
        )
        past = past_runs(job.data.output, summary.run)
        report = _beside(report, read_report(job.data.output, before))
        report = report.model_copy(update={"ended": time.time(), "verdict": verdict(report, past)})
        # The page first, so that every JSON file has its page.
        _write(path, page(report, past))
        _write(path.with_suffix(".json"), report.model_dump_json(indent=1))
        _forget_old(folder, keep={summary.run, before})
    except (GlmbatchError, OSError) as error:
        logger.warning("%s: the report of the run could not be written: %s", path, error)
        return summary.model_copy(update={"report": None})
    return summary


def read_report(output: str, run: str | None) -> Report | None:
    """The facts of `run`; None if its report is missing or cannot be read."""
    path = Folder(output) / REPORTS / f"{run}.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, GlmbatchError, ValidationError):
        return None


def past_runs(output: str, run: str) -> list[PastRun]:
    """The runs before `run` whose reports are kept and can be read, the oldest first."""
    times = times_written(Folder(output) / REPORTS, ".json")
    names = sorted(times.keys() - {f"{run}.json"}, key=times.__getitem__)[1 - KEPT :]
    # In a store, several at once.
    reports = Folder(output).map(
        lambda name: read_report(output, name.removesuffix(".json")), names
    )
    return [
        past_run(report, times[name])
        for name, report in zip(names, reports, strict=True)
        if report is not None
    ]


def _beside(report: Report, last: Report | None) -> Report:
    """`report` with the label counts of the run that was published `last`, for comparison."""
    if last is None:
        return report
    steps = last.summary.steps
    facts = {
        "before": last.summary.run,
        "labels_before": {step.name: step.labels for step in steps},
        "labelled_before": {step.name: step.labelled for step in steps},
        "without_label_before": {step.name: step.without_label for step in steps},
    }
    return report.model_copy(update=facts)


def _device(runtime: RuntimeConfig) -> str:
    if runtime.cluster is not None:
        return f"cluster: {runtime.cluster}"
    from glmbatch.glm.device import describe_device

    return describe_device(runtime.device)


def _write(path: AnyPath, text: str) -> None:
    with committed(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _forget_old(folder: AnyPath, keep: set[str | None]) -> None:
    """Delete all reports except the newest KEPT and those of the runs in `keep`."""
    pages = by_age(folder, ".html")
    for path in pages[:-KEPT]:
        if path.stem not in keep:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
