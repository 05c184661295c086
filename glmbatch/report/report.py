"""The files that people look at after a run: its facts as JSON, and as a page.

    OUTPUT/_glmbatch/reports/<run>.html    one file, which loads nothing from elsewhere
    OUTPUT/_glmbatch/reports/<run>.json    the same facts; the next run compares itself with them

The last reports are kept; each may be deleted at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import ValidationError

from glmbatch.errors import GlmbatchError
from glmbatch.report.facts import Report
from glmbatch.report.html import page
from glmbatch.report.measures import Measures
from glmbatch.report.summary import Summary
from glmbatch.settings.job import JobConfig, RuntimeConfig
from glmbatch.store.files import committed, modified
from glmbatch.store.folder import Folder
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

REPORTS = "_glmbatch/reports"
KEPT = 30  # a month of nights


def write_report(
    job: JobConfig, summary: Summary, measures: Sequence[Measures], before: str | None
) -> str | None:
    """Write the report of a run, published or refused; returns the path of its page.

    `before` is the run that was published last. A report that cannot be written is a warning and
    None: no run fails by it.
    """
    folder = Folder(job.data.output) / REPORTS
    path = folder / f"{summary.run}.html"
    summary = summary.model_copy(update={"report": str(path)})
    try:
        report = Report(
            input=job.data.input,
            summary=summary,
            measures=tuple(measures),
            models={step.name: job.model_of(step).path for step in job.steps},
            # A run that asked no model has not even imported torch.
            device=_device(job.runtime) if summary.computed else None,
            price_per_hour=job.report.price_per_hour,
        )
        report = _beside(report, read_report(job.data.output, before))
        # The page first: whoever finds the facts finds the page too.
        _write(path, page(report))
        _write(path.with_suffix(".json"), report.model_dump_json(indent=1))
        _forget_old(folder, keep={summary.run, before})
    except (GlmbatchError, OSError) as error:
        logger.warning("%s: the report of the run is not written: %s", path, error)
        return None
    return str(path)


def read_report(output: str, run: str | None) -> Report | None:
    """The facts of `run`; None when there is no report of it, or none that can be read."""
    path = Folder(output) / REPORTS / f"{run}.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, GlmbatchError, ValidationError):
        return None


def _beside(report: Report, last: Report | None) -> Report:
    """The report with the labels of the run that was published `last`, to compare with."""
    if last is None:
        return report
    labels = {step.name: step.labels for step in last.summary.steps}
    return report.model_copy(update={"before": last.summary.run, "labels_before": labels})


def _device(runtime: RuntimeConfig) -> str:
    if runtime.cluster is not None:
        return f"a cluster: {runtime.cluster}"
    from glmbatch.glm.device import describe_device

    return describe_device(runtime.device)


def _write(path: AnyPath, text: str) -> None:
    with committed(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _forget_old(folder: AnyPath, keep: set[str | None]) -> None:
    """Delete all reports but the last KEPT and those of the runs `keep`."""
    pages = sorted(folder.glob("*.html"), key=modified)
    for path in pages[:-KEPT]:
        if path.stem not in keep:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
