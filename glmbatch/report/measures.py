"""Measurements of a run's answers: confidence, lengths, throughput, and samples of each label.

Takes receipts and what was read from the outputs. Opens no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from pydantic import BaseModel

from glmbatch.ledger.receipts import LENGTH_BIN, AnswersReceipt, OutputReceipt
from glmbatch.report.counts import span_seconds
from glmbatch.report.outputs import CONFIDENCE_BINS, Reading, ReportedStep, Sample

# Number of bars and of line points in a plot that is 350 pixels wide.
LENGTH_BINS = 24
RATE_BINS = 30
# Number of fragments in the list of the slowest.
SLOWEST = 5


class Histogram(BaseModel, frozen=True, extra="forbid"):
    """How many values fall in each bin; bins are `width` wide and start at 0."""

    width: float
    counts: tuple[int, ...]


class Slow(BaseModel, frozen=True, extra="forbid"):
    """The time and work of one slow fragment."""

    fragment: str
    seconds: float
    computed_rows: int
    tokens: int


class Measures(BaseModel, frozen=True, extra="forbid"):
    """The measurements of one step.

    `rates` are pairs: seconds since the model started, and rows per second at that time.
    """

    step: str
    histograms: dict[str, Histogram]
    samples: tuple[Sample, ...]
    rates: tuple[tuple[float, float], ...]
    slowest: tuple[Slow, ...]


def measure(
    steps: Sequence[ReportedStep], run: str, outputs: Sequence[OutputReceipt], reading: Reading
) -> tuple[Measures, ...]:
    """The measures of each step over `outputs`; rates and times cover only the work of `run`."""
    busy = [_busy(run, outputs, index) for index in range(len(steps))]
    # All steps share one origin, so that their lines can be compared.
    began = min((receipt.began for receipt in chain(*busy)), default=0.0)
    measures = []
    for index, step in enumerate(steps):
        receipts = [output.answers[index] for output in outputs]
        slowest = sorted(busy[index], key=lambda receipt: -receipt.seconds)[:SLOWEST]
        measures.append(
            Measures(
                step=step.name,
                histograms=_histograms(step, receipts, reading),
                samples=tuple(reading.labelled.get(step.name, ())),
                rates=tuple(_rates(busy[index], began)),
                slowest=tuple(_slow(receipt) for receipt in slowest),
            )
        )
    return tuple(measures)


def _busy(run: str, outputs: Sequence[OutputReceipt], index: int) -> list[AnswersReceipt]:
    """The receipts of a step for which `run` used the model."""
    # By key, because fragments with the same rows share one receipt.
    receipts = {}
    for output in outputs:
        receipt = output.answers[index]
        if receipt.run == run and receipt.computed_rows:
            receipts[receipt.file_key, receipt.key] = receipt
    return list(receipts.values())


def _slow(receipt: AnswersReceipt) -> Slow:
    return Slow(
        fragment=receipt.fragment,
        seconds=receipt.seconds,
        computed_rows=receipt.computed_rows,
        tokens=receipt.prompt_tokens + receipt.completion_tokens,
    )


def _histograms(
    step: ReportedStep, receipts: Sequence[AnswersReceipt], reading: Reading
) -> dict[str, Histogram]:
    counts = reading.counts.get(step.name, np.zeros(0, np.int64))
    prompts = _prompt_lengths(receipts)
    if step.measured is None:
        return {"prompt_tokens": prompts}
    if step.classifies:
        return {"prompt_tokens": prompts, "score": _confidence(counts)}
    return {"prompt_tokens": prompts, "completion_tokens": _lengths(counts, 1)}


def _confidence(counts: np.ndarray) -> Histogram:
    """A histogram from 0 to 1, of scores counted in units of 1 / CONFIDENCE_BINS."""
    padded = np.pad(counts, (0, CONFIDENCE_BINS + 1 - len(counts)))
    padded[-2] += padded[-1]  # a score of 1 belongs to the last bin
    return Histogram(width=1 / CONFIDENCE_BINS, counts=padded[:-1].tolist())


def _prompt_lengths(receipts: Iterable[AnswersReceipt]) -> Histogram:
    rows: Counter[int] = Counter()
    for receipt in receipts:
        rows.update(receipt.prompt_lengths)
    counts = np.zeros(max(rows, default=0) + 1, np.int64)
    counts[list(rows)] = list(rows.values())  # receipts count by the first length of each bin
    return _lengths(counts, LENGTH_BIN)


def _lengths(counts: np.ndarray, least: int) -> Histogram:
    """Counts by length, merged into bins of equal width, which is a multiple of `least`."""
    width = max(1, -(-len(counts) // (LENGTH_BINS * least))) * least
    whole = np.pad(counts, (0, -len(counts) % width))
    return Histogram(width=width, counts=whole.reshape(-1, width).sum(1).tolist())


def _rates(receipts: Sequence[AnswersReceipt], began: float) -> list[tuple[float, float]]:
    """Rows per second in equal time bins. A fragment's rows are spread evenly over its duration."""
    if not receipts:
        return []
    first = min(receipt.began for receipt in receipts)
    # A coarse clock must not make the width 0.
    width = max(span_seconds(receipts), 1e-6) / RATE_BINS
    points = []
    for number in range(RATE_BINS):
        start = first + number * width
        rows = sum(_rows_between(receipt, start, start + width) for receipt in receipts)
        points.append((start + width / 2 - began, rows / width))
    return points


def _rows_between(receipt: AnswersReceipt, start: float, end: float) -> float:
    """The share of the receipt's computed rows between `start` and `end`, in rows."""
    if not receipt.seconds:
        return 0.0
    overlap = min(end, receipt.began + receipt.seconds) - max(start, receipt.began)
    return receipt.computed_rows * max(0.0, overlap) / receipt.seconds
