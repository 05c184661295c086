"""The report of a run as one HTML page: the order of its sections. `page` does the escaping."""

from __future__ import annotations

from collections.abc import Iterator

from glmbatch.report import page as elements
from glmbatch.report.facts import (
    Report,
    answers,
    errors_by_reason,
    label_drift,
    label_shares,
    outcome,
    run_facts,
)
from glmbatch.report.measures import Histogram, Measures
from glmbatch.report.outputs import SAMPLE_CHARS
from glmbatch.report.summary import StepSummary, Summary, short

# A histogram's title and the name of its axis.
HISTOGRAMS = {
    "score": ("confidence", "score of the chosen label"),
    "prompt_tokens": ("length of prompts", "tokens"),
    "completion_tokens": ("length of answers", "tokens"),
}


def page(report: Report) -> str:
    """The report as a complete HTML file."""
    return elements.page(f"Answers to {report.input}", _parts(report))


def _parts(report: Report) -> Iterator[str]:
    summary = report.summary
    yield elements.paragraph(outcome(summary), warning=summary.refused is not None)
    yield elements.facts(run_facts(report))
    yield from _errors(summary)
    yield from _throughput(report)
    # Both are in the order of the job's steps.
    for step, measures in zip(summary.steps, report.measures, strict=True):
        yield from _step(report, step, measures)
    if summary.audits:
        yield elements.heading("Audits")
        for audit in summary.audits:
            yield elements.paragraph(str(audit))
    if summary.samples:
        yield from _rows(summary)


def _errors(summary: Summary) -> Iterator[str]:
    yield elements.heading("Errors by reason")
    yield elements.table(["step", "reason", "rows"], errors_by_reason(summary))
    for fault in summary.unusable:
        yield elements.paragraph(f"{fault.source}: {fault.reason}", warning=True)


def _throughput(report: Report) -> Iterator[str]:
    yield elements.heading("Throughput")
    rates = [(measures.step, measures.rates) for measures in report.measures if measures.rates]
    axes = ("seconds since the model started", "rows/s")
    yield elements.lines("rows processed by the model", *axes, rates)


def _step(report: Report, step: StepSummary, measures: Measures) -> Iterator[str]:
    yield elements.heading(step.name)
    yield elements.paragraph(answers(step))
    if step.labels:
        yield from _labels(report, step)
    for name, histogram in measures.histograms.items():
        title, axis = HISTOGRAMS[name]
        series = [("rows", histogram.counts)]
        yield elements.bars(f"{step.name}: {title}", axis, "rows", _bins(histogram), series)
    if measures.samples:
        rows = [[sample.text, sample.label, f"{sample.score:.3f}"] for sample in measures.samples]
        yield elements.table(["text", "label", "score"], rows)
    if measures.slowest:
        yield _slowest(measures)


def _labels(report: Report, step: StepSummary) -> Iterator[str]:
    """The label shares, next to those of the previous published run."""
    shares = label_shares(report, step)
    series = [("this run", [share.share for share in shares])]
    columns = 3  # without a previous run, the last two would be all zeros
    if report.labels_before.get(step.name):
        series.append(("previous run", [share.share_before for share in shares]))
        columns = 5
    head = ["label", "rows", "share", "previous rows", "previous share"]
    rows = []
    for share in shares:
        cells = [share.label, share.rows, f"{share.share:.1%}"]
        cells += [share.rows_before, f"{share.share_before:.1%}"]
        rows.append(cells[:columns])
    yield elements.table(head[:columns], rows)
    yield elements.paragraph(label_drift(report, step))
    names = [share.label for share in shares]
    title = f"{step.name}: label shares"
    yield elements.bars(title, "label", "share of labelled rows", names, series)


def _bins(histogram: Histogram) -> list[str]:
    names = []
    for number in range(len(histogram.counts)):
        low = number * histogram.width
        names.append(f"{low:g} to {low + histogram.width:g}")
    return names


def _slowest(measures: Measures) -> str:
    head = ["slowest fragments", "seconds", "rows processed", "tokens"]
    rows = []
    for slow in measures.slowest:
        rows.append([slow.fragment, f"{slow.seconds:.2f}", slow.computed_rows, slow.tokens])
    return elements.table(head, rows)


def _rows(summary: Summary) -> Iterator[str]:
    """A table of a few rows with their answers."""
    names = list(summary.samples[0])
    rows = []
    for sample in summary.samples:
        values = [sample[name] for name in names]
        rows.append(["" if value is None else short(value, SAMPLE_CHARS) for value in values])
    yield elements.heading("Sample rows")
    yield elements.table(names, rows)
