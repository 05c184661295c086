"""The report of a run as one HTML page: the order of its sections. `elements` does the escaping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from glmbatch.report.counts import total
from glmbatch.report.facts import (
    LabelShare,
    Report,
    answers,
    errors_by_reason,
    label_drift,
    label_shares,
    run_facts,
)
from glmbatch.report.measures import Histogram, Measures
from glmbatch.report.oddest import SAMPLE_CHARS
from glmbatch.report.page import elements
from glmbatch.report.page.plots import COLOURS, Axis, Line, bars, histogram, lines
from glmbatch.report.summary import StepSummary, Summary, short
from glmbatch.report.trends import PastRun, PastStep, dates, past_run

# A histogram's title and its axis.
HISTOGRAMS = {
    "score": ("confidence", Axis("score of the chosen label", ends=(0, 1))),
    "prompt_tokens": ("length of prompts", Axis("tokens")),
    "completion_tokens": ("length of answers", Axis("tokens")),
}
ROWS = Axis("rows", least=1)
SHARE = Axis("share of rows", percent=True, ends=(0.0,))
LABELLED = SHARE._replace(name="share of labelled rows")
BARS = 12  # of one plot; the table below it has every label


def page(report: Report, past: Sequence[PastRun] = ()) -> str:
    """The report as a complete HTML file; `past` are the runs before it, the oldest first."""
    return elements.page(f"Answers to {report.input}", _parts(report, past))


def _parts(report: Report, past: Sequence[PastRun]) -> Iterator[str]:
    summary = report.summary
    ended = datetime.fromtimestamp(report.ended, UTC)
    yield elements.paragraph(f"{ended:%A, %d %B %Y, %H:%M} UTC · run {summary.run}", soft=True)
    yield from _verdict(report)
    if past:
        runs = [*past, past_run(report, report.ended)]
        yield elements.heading(f"The last {len(runs)} runs")
        yield elements.plots(_trends(runs))
        yield elements.folded("The runs as a table", [_runs(runs)])
    # Both are in the order of the job's steps.
    for step, measures in zip(summary.steps, report.measures, strict=True):
        yield from _step(report, step, measures)
    yield from _errors(summary)
    yield from _speed(report)
    if summary.audits:
        yield elements.heading("Audits")
        for audit in summary.audits:
            yield elements.paragraph(str(audit))
    if summary.samples:
        yield from _rows(summary)
    yield elements.heading("The run")
    yield elements.facts(run_facts(report))


def _verdict(report: Report) -> Iterator[str]:
    if report.verdict is not None:
        refused = report.summary.refused is not None
        kind = "bad" if refused else "watch" if report.verdict.changed else ""
        yield elements.verdict(report.verdict.lines, kind)


def _trends(runs: Sequence[PastRun]) -> Iterator[str]:
    """Plots over the runs: label shares of each step, then what all steps have."""
    x = Axis("", names=[_named(run, date) for run, date in zip(runs, dates(runs), strict=True)])
    for name in runs[-1].steps:
        labels = list(total(run.steps[name].labels for run in runs if name in run.steps))
        series: list[Line] = []
        for label in labels[:COLOURS]:
            series.append((label, _points(runs, name, partial(PastStep.share, label=label))))
        if labels:
            yield lines(f"{name}: label shares", x, LABELLED, series)
    for title, y, value in (
        ("failed rows", SHARE, lambda step: step.failed),
        ("throughput", Axis("rows/s", ends=(0.0,)), lambda step: step.rows_per_second),
        ("confidence", Axis("mean score"), lambda step: step.confidence),
        ("length of prompts", Axis("tokens, mean", ends=(0.0,)), lambda step: step.prompt_tokens),
        ("length of answers", Axis("tokens, mean", ends=(0.0,)), lambda step: step.answer_tokens),
    ):
        yield lines(title, x, y, [(name, _points(runs, name, value)) for name in runs[-1].steps])


def _named(run: PastRun, date: str) -> str:
    return date if run.published else f"{date}, refused"


def _points(
    runs: Sequence[PastRun], name: str, value: Callable[[PastStep], float | None]
) -> list[tuple[float, float]]:
    """The value of a step in each run that has one, with the number of the run."""
    points = []
    for at, run in enumerate(runs, 1):
        number = value(run.steps[name]) if name in run.steps else None
        if number is not None:
            points.append((float(at), number))
    return points


def _runs(runs: Sequence[PastRun]) -> str:
    rows = []
    for run, date in zip(runs[::-1], dates(runs)[::-1], strict=True):
        failed = max((step.failed for step in run.steps.values()), default=0.0)
        state = "published" if run.published else "refused"
        rows.append([date, state, f"{run.rows:,}", f"{failed:.1%}", run.run])
    return elements.table(["ended (UTC)", "", "rows", "failed", "run"], rows)


def _errors(summary: Summary) -> Iterator[str]:
    errors = errors_by_reason(summary)
    yield elements.heading("Errors by reason")
    if not errors:
        yield elements.paragraph("No row failed and no file was left out.")
        return
    yield elements.table(["step", "reason", "rows"], errors)
    for fault in summary.unusable:
        yield elements.paragraph(f"{fault.source}: {fault.reason}", warning=True)


def _speed(report: Report) -> Iterator[str]:
    rates = [(measures.step, measures.rates) for measures in report.measures if measures.rates]
    if not rates:
        return
    yield elements.heading("Speed")
    x = Axis("seconds since the model started", ends=(0.0,))
    y = Axis("rows/s", ends=(0.0,))
    yield elements.plots([lines("rows processed by the model", x, y, rates)])
    head = ["step", "slowest fragments", "seconds", "rows processed", "tokens"]
    rows = []
    for measures in report.measures:
        for slow in measures.slowest:
            numbers = (f"{slow.seconds:.2f}", f"{slow.computed_rows:,}", f"{slow.tokens:,}")
            rows.append([measures.step, slow.fragment, *numbers])
    yield elements.table(head, rows)


def _step(report: Report, step: StepSummary, measures: Measures) -> Iterator[str]:
    yield elements.heading(step.name)
    yield elements.paragraph(answers(step))
    shares = label_shares(report, step)
    figures = []
    if step.labels:
        series = [("this run", [share.share for share in shares[:BARS]])]
        if report.labels_before.get(step.name):
            series.append(("previous run", [share.share_before for share in shares[:BARS]]))
        names = [share.label for share in shares[:BARS]]
        figures.append(bars(f"{step.name}: label shares", LABELLED, names, series))
    for name, counts in measures.histograms.items():
        title, axis = HISTOGRAMS[name]
        figures.append(_histogram(f"{step.name}: {title}", axis, counts))
    yield elements.plots(figures)
    if step.labels:
        yield _label_table(shares, compared=bool(report.labels_before.get(step.name)))
        yield elements.paragraph(label_drift(report, step), soft=True)
    yield from _odd(measures)
    if measures.samples:
        rows = [[sample.text, sample.label, f"{sample.score:.3f}"] for sample in measures.samples]
        table = elements.table(["text", "label", "score"], rows)
        yield elements.folded("A few rows of each label", [table])


def _histogram(title: str, axis: Axis, counts: Histogram) -> str:
    return histogram(title, axis, ROWS, counts.width, counts.counts)


def _label_table(shares: Sequence[LabelShare], *, compared: bool) -> str:
    """The label shares, next to those of the previous published run."""
    columns = 5 if compared else 3  # the last two would be all zeros
    head = ["label", "rows", "share", "previous rows", "previous share"]
    rows = []
    for share in shares:
        cells = [share.label, share.rows, f"{share.share:.1%}"]
        cells += [share.rows_before, f"{share.share_before:.1%}"]
        rows.append(cells[:columns])
    return elements.table(head[:columns], rows)


def _odd(measures: Measures) -> Iterator[str]:
    """The rows and the fragments that are least like the others."""
    if measures.oddest:
        sure = "score" in measures.histograms
        form = ".3f" if sure else ".0f"
        rows = []
        for odd in measures.oddest:
            value = f"{odd.value:{form}}"
            rows.append([odd.text, odd.answer, value, f"{odd.source}, row {odd.row:,}"])
        value = "score" if sure else "tokens"
        yield elements.paragraph("The least sure answers:" if sure else "The longest answers:")
        yield elements.table(["text", "answer", value, "where"], rows)
    if measures.odd_fragments:
        lines = []
        for fragment in measures.odd_fragments:
            shares = (f"{fragment.share:.1%}", f"{fragment.usual:.1%}")
            lines.append([fragment.fragment, f"{fragment.rows:,}", fragment.what, *shares])
        yield elements.paragraph("Fragments with other shares than the rest:")
        yield elements.table(["fragment", "rows", "what", "share there", "share in all"], lines)


def _rows(summary: Summary) -> Iterator[str]:
    """A table of a few rows with their answers."""
    names = list(summary.samples[0])
    rows = []
    for sample in summary.samples:
        values = [sample[name] for name in names]
        rows.append(["" if value is None else short(value, SAMPLE_CHARS) for value in values])
    yield elements.heading("Sample rows")
    yield elements.table(names, rows)
