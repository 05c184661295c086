"""Earlier runs as a few numbers each, read from the reports kept beside the output.

No file of rows is opened, so 30 nights of any size cost 30 small files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median

from glmbatch.report.facts import Report
from glmbatch.report.measures import Histogram, Measures
from glmbatch.report.summary import StepSummary

# A value stands out if it is this many robust standard deviations from the usual one.
DEVIATIONS = 3 * 1.4826  # the factor makes a median deviation a standard deviation


@dataclass(frozen=True, slots=True)
class PastStep:
    """The answers of one step in one run.

    `labelled` rows have one of `labels` or several. Tokens and confidence are means over rows, None
    without any.
    """

    labels: Mapping[str, int]
    labelled: int
    without_label: int
    failed: float
    rows_per_second: float | None
    prompt_tokens: float | None
    answer_tokens: float | None
    confidence: float | None

    def share(self, label: str) -> float:
        """The share of `label` among the rows with a label."""
        return self.labels.get(label, 0) / max(1, self.labelled)


@dataclass(frozen=True, slots=True)
class PastRun:
    """One run, published or refused; `ended` is in seconds since 1970."""

    run: str
    ended: float
    published: bool
    rows: int
    steps: dict[str, PastStep] = field(default_factory=dict)


def past_run(report: Report, ended: float) -> PastRun:
    """The numbers of `report`; `ended` counts only if the report does not say it."""
    steps = {}
    for step, measures in zip(report.summary.steps, report.measures, strict=True):
        steps[step.name] = _past_step(step, measures)
    summary = report.summary
    return PastRun(
        run=summary.run,
        ended=report.ended or ended,  # reports of earlier versions do not
        published=summary.refused is None,
        rows=summary.rows,
        steps=steps,
    )


def _past_step(step: StepSummary, measures: Measures) -> PastStep:
    histograms = measures.histograms
    return PastStep(
        labels=step.labels,
        labelled=step.labelled,
        without_label=step.without_label,
        failed=step.failed / max(1, step.answers),
        rows_per_second=step.rows_per_second,
        prompt_tokens=_mean(histograms.get("prompt_tokens")),
        answer_tokens=_mean(histograms.get("completion_tokens")),
        confidence=_mean(histograms.get("score")),
    )


def _mean(histogram: Histogram | None) -> float | None:
    """The mean of the counted values, each taken as the middle of its bin."""
    if histogram is None or not sum(histogram.counts):
        return None
    total = sum((at + 0.5) * count for at, count in enumerate(histogram.counts))
    return histogram.width * total / sum(histogram.counts)


def usual(values: Sequence[float], floor: float) -> tuple[float, float]:
    """The usual value of earlier runs, and how far from it another value is unremarkable.

    The second is at least `floor`. One odd night among the earlier ones moves neither.
    """
    middle = median(values)
    spread = median(abs(value - middle) for value in values)
    return middle, max(floor, DEVIATIONS * spread)


def dates(runs: Sequence[PastRun]) -> list[str]:
    """When each run ended, in UTC: the day, and the time where two runs ended on one day."""
    ends = [datetime.fromtimestamp(run.ended, UTC) for run in runs]
    one_a_day = len({end.date() for end in ends}) == len(ends)
    return [
        f"{end:%b} {end.day}" if one_a_day else f"{end:%b} {end.day} {end:%H:%M}" for end in ends
    ]
