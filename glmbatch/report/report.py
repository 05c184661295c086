"""What people look at after a run: its facts, as JSON, as a page, and as a short text for Prefect.

    OUTPUT/_glmbatch/reports/<run>.html    one file, which loads nothing from elsewhere
    OUTPUT/_glmbatch/reports/<run>.json    the same facts; the next run sets its own beside them

The last reports are kept; each may be deleted at any time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from glmbatch.errors import GlmbatchError
from glmbatch.ledger.receipts import OutputReceipt
from glmbatch.report import page as html
from glmbatch.report.measures import SAMPLE_CHARS, Histogram, Measures, measure
from glmbatch.report.summary import StepSummary, Summary, short
from glmbatch.run.audits import population_stability
from glmbatch.settings.job import JobConfig
from glmbatch.store.files import committed, modified, writable
from glmbatch.store.paths import AnyPath, location

logger = logging.getLogger(__name__)

REPORTS = "_glmbatch/reports"
KEPT = 30
# What the columns of a step's answers are called on the page.
MEASURED = {
    "score": ("confidence", "score of the chosen label"),
    "prompt_tokens": ("length of prompts", "tokens"),
    "completion_tokens": ("length of answers", "tokens"),
}


class Report(BaseModel, frozen=True, extra="forbid"):
    """The facts of one run. `device` is None when no model was asked.

    `before` is the run that was published last when this one began, with its labels by step.
    """

    input: str
    summary: Summary
    measures: tuple[Measures, ...]
    models: dict[str, str]
    device: str | None
    price_per_hour: float | None
    before: str | None = None
    labels_before: dict[str, dict[str, int]] = {}

    @property
    def cost(self) -> float | None:
        """Of the whole time from plan to publication: a machine is paid for while it waits too."""
        return (
            None
            if self.price_per_hour is None
            else self.summary.seconds / 3600 * self.price_per_hour
        )


def write_report(
    job: JobConfig, summary: Summary, outputs: Sequence[OutputReceipt], before: str | None
) -> str | None:
    """Write the report of a run over `outputs`, published or refused; the path of its page.

    `before` is the run that was published last. None, and a warning, when it cannot be written: no run fails by it.
    """
    folder = location(job.data.output) / REPORTS
    path = folder / f"{summary.run}.html"
    try:
        report = _gathered(job, summary.model_copy(update={"report": str(path)}), outputs, before)
        for file, text in (
            (path, page(report)),
            (path.with_suffix(".json"), report.model_dump_json(indent=1)),
        ):
            with committed(file) as partial, writable(file):
                partial.write_text(text, encoding="utf-8")
        _forget_old(folder, keep={summary.run, before})
    except (GlmbatchError, OSError) as error:
        logger.warning("%s: the report of the run is not written: %s", path, error)
        return None
    return str(path)


def read_report(output: str, run: str | None) -> Report | None:
    """The facts of `run`; None when there is no report of it, or none to be read now."""
    try:
        return Report.model_validate_json((location(output) / REPORTS / f"{run}.json").read_bytes())
    except (OSError, GlmbatchError, ValidationError):
        return None


def _gathered(
    job: JobConfig, summary: Summary, outputs: Sequence[OutputReceipt], before: str | None
) -> Report:
    device = None
    if summary.computed and job.runtime.cluster is not None:
        device = f"a cluster: {job.runtime.cluster}"
    elif summary.computed:  # else torch is not even imported
        from glmbatch.glm.device import describe_device

        device = describe_device(job.runtime.device)
    last = read_report(job.data.output, before)
    return Report(
        input=job.data.input,
        summary=summary,
        measures=measure(job, summary.run, outputs),
        models={step.name: job.model_of(step).path for step in job.steps},
        device=device,
        price_per_hour=job.report.price_per_hour,
        before=last and last.summary.run,
        labels_before={step.name: step.labels for step in last.summary.steps} if last else {},
    )


def _forget_old(folder: AnyPath, keep: set[str | None]) -> None:
    pages = sorted(folder.glob("*.html"), key=modified)
    for path in pages[:-KEPT]:
        if path.stem not in keep:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


def errors_by_reason(report: Report) -> list[tuple[str, str, int]]:
    """For each step and each reason why rows of it failed, how many; then the files left out."""
    summary = report.summary
    lines = [
        (step.name, reason, rows) for step in summary.steps for reason, rows in step.faults.items()
    ]
    return [
        *lines,
        *([("files left out", "unusable_file", len(summary.unusable))] if summary.unusable else []),
    ]


def page(report: Report) -> str:
    """The HTML of a report."""
    summary = report.summary
    parts = [
        html.paragraph(_outcome(report), warning=summary.refused is not None),
        html.facts(facts(report)),
        html.heading("Errors by reason"),
        html.table(["step", "reason", "rows"], errors_by_reason(report)),
        *(
            html.paragraph(f"{fault.source}: {fault.reason}", warning=True)
            for fault in summary.unusable
        ),
        html.heading("Throughput"),
        html.lines(
            "rows through the model",
            "seconds since the model began",
            "rows/s",
            [(each.step, each.rates) for each in report.measures if each.rates],
        ),
    ]
    for step, measures in zip(summary.steps, report.measures, strict=True):
        parts += _step_parts(report, step, measures)
    if summary.audits:
        parts += [html.heading("Audits"), *(html.paragraph(str(audit)) for audit in summary.audits)]
    if summary.samples:
        names = list(summary.samples[0])
        rows = [[short(sample[name], SAMPLE_CHARS) for name in names] for sample in summary.samples]
        parts += [html.heading("A few rows"), html.table(names, rows)]
    return html.page(f"Answers to {report.input}", parts)


def _outcome(report: Report) -> str:
    return f"Refused: {report.summary.refused}" if report.summary.refused else "Published."


def facts(report: Report) -> list[tuple[str, str]]:
    """What the run was, in a few lines: name and value."""
    summary = report.summary
    steps = summary.steps
    lines = [
        ("run", summary.run),
        ("output", summary.output),
        ("rows", f"{summary.rows:,} in {summary.fragments} fragments"),
        ("failed rows", f"{summary.faulty_rows:,}"),
        ("files left out", f"{len(summary.unusable)}"),
        ("answers", f"{sum(step.answers for step in steps):,}"),
        ("computed, reused, of repeated texts", _three(steps)),
        (
            "tokens",
            f"{_sum(steps, 'prompt_tokens'):,} read, {_sum(steps, 'completion_tokens'):,} written",
        ),
        ("time", f"{summary.seconds:.1f} s"),
        ("device", report.device or "none: no model was asked"),
        *((f"model of {step}", path) for step, path in report.models.items()),
    ]
    if report.cost is not None:
        lines.append(("cost", f"{report.cost:.4g} at {report.price_per_hour:g} for an hour"))
    return lines


def _three(steps: Sequence[StepSummary]) -> str:
    return ", ".join(f"{_sum(steps, name):,}" for name in ("computed", "reused", "repeated"))


def _sum(steps: Sequence[StepSummary], name: str) -> int:
    return sum(getattr(step, name) for step in steps)


def _step_parts(report: Report, step: StepSummary, measures: Measures) -> list[str]:
    rate = "" if step.rows_per_second is None else f", {step.rows_per_second:,.1f} rows/s"
    parts = [
        html.heading(step.name),
        html.paragraph(
            f"{step.answers:,} answers: {step.computed:,} computed, {step.reused:,} reused, {step.repeated:,} of "
            f"repeated texts, {sum(step.faults.values()):,} failed{rate}"
        ),
    ]
    if step.labels:
        parts += _labels_parts(report, step)
    for name, histogram in measures.histograms.items():
        what, x_name = MEASURED[name]
        parts.append(
            html.bars(
                f"{step.name}: {what}",
                x_name,
                "rows",
                _bins(histogram),
                [("rows", histogram.counts)],
            )
        )
    if measures.samples:
        rows = [[sample.text, sample.label, f"{sample.score:.3f}"] for sample in measures.samples]
        parts.append(html.table(["text", "label", "score"], rows))
    if measures.slowest:
        slow = [
            [e.fragment, f"{e.seconds:.2f}", e.computed_rows, e.tokens] for e in measures.slowest
        ]
        parts.append(
            html.table(["slowest fragments", "seconds", "rows through the model", "tokens"], slow)
        )
    return parts


def _labels_parts(report: Report, step: StepSummary) -> list[str]:
    """The shares of labels, beside those of the run that was published before."""
    shares = label_shares(report, step)
    series = [("this run", [each.share for each in shares])]
    told = "Nothing was published before by this step, or its report is gone."
    before = report.labels_before.get(step.name)
    shown = 5 if before else 3
    if before:
        series.append(("the run before", [each.share_before for each in shares]))
        moved = population_stability(before, step.labels)
        told = f"Moved by {moved:.4f} from the run before, {report.before} (0.1 is a small shift, 0.25 a large one)."
    head = ["label", "rows", "share", "rows before", "share before"]
    rows = [
        [e.label, e.rows, f"{e.share:.1%}", e.rows_before, f"{e.share_before:.1%}"] for e in shares
    ]
    names = [each.label for each in shares]
    return [
        html.table(head[:shown], [row[:shown] for row in rows]),
        html.paragraph(told),
        html.bars(f"{step.name}: shares of labels", "label", "share of rows", names, series),
    ]


@dataclass(frozen=True, slots=True)
class LabelShare:
    """A label's rows, and their share of all that have one, in a run and in the one that was published before."""

    label: str
    rows: int
    share: float
    rows_before: int
    share_before: float


def label_shares(report: Report, step: StepSummary) -> list[LabelShare]:
    """Each label of `step` in this run or the one before, the most frequent first."""
    now, then = step.labels, report.labels_before.get(step.name, {})
    shares, shares_then = _shares(now), _shares(then)
    return [
        LabelShare(e, now.get(e, 0), shares.get(e, 0.0), then.get(e, 0), shares_then.get(e, 0.0))
        for e in dict.fromkeys([*now, *then])
    ]


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    return {label: rows / sum(counts.values()) for label, rows in counts.items()}


def _bins(histogram: Histogram) -> list[str]:
    return [
        f"{at * histogram.width:g} to {(at + 1) * histogram.width:g}"
        for at in range(len(histogram.counts))
    ]


def markdown(report: Report) -> str:
    """The same facts, shorter."""
    parts = [_plain(_outcome(report)), _markdown_table(["", ""], facts(report))]
    for step in report.summary.steps:
        if step.labels:
            rows = [
                (e.label, f"{e.share:.1%}", f"{e.share_before:.1%}")
                for e in label_shares(report, step)
            ]
            shown = 3 if report.labels_before.get(step.name) else 2
            head = [step.name, "share", f"in the run before, {report.before}"]
            parts.append(_markdown_table(head[:shown], [row[:shown] for row in rows]))
    return "\n\n".join(parts)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(_plain(cell) if cell != '---' else cell for cell in line)} |"
        for line in lines
    )


def _plain(text: str) -> str:
    """`text` without any mark that Markdown would read."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))
