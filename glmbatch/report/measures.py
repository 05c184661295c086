"""Measurements of a run's answers: confidence, lengths, throughput, and samples of each label.

Takes receipts and what was read from the outputs. Opens no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from math import sqrt
from operator import itemgetter

import numpy as np
from pydantic import BaseModel

from glmbatch.ledger.receipts import LENGTH_BIN, AnswersReceipt, OutputReceipt
from glmbatch.report.counts import span_seconds, total
from glmbatch.report.oddest import OddRow
from glmbatch.report.outputs import CONFIDENCE_BINS, Reading, ReportedStep, Sample

# Number of bars and of line points in a plot that is 350 pixels wide.
LENGTH_BINS = 24
RATE_BINS = 30
# Number of fragments in the lists of the slowest and the oddest.
SLOWEST = 5
ODD = 5
# A share is odd this many standard errors from that of all fragments, in this many rows or more.
ODD_ERRORS = 4.0
ODD_ROWS = 30


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


class OddFragment(BaseModel, frozen=True, extra="forbid"):
    """A fragment with another `share` of `what`, a label or failures, than all have together."""

    fragment: str
    what: str
    rows: int
    share: float
    usual: float


class Measures(BaseModel, frozen=True, extra="forbid"):
    """The measurements of one step.

    `rates` are pairs: seconds since the model started, and rows per second at that time. `oddest`
    are the rows with the least sure labels, or with the longest answers.
    """

    step: str
    histograms: dict[str, Histogram]
    samples: tuple[Sample, ...]
    rates: tuple[tuple[float, float], ...]
    slowest: tuple[Slow, ...]
    oddest: tuple[OddRow, ...] = ()
    odd_fragments: tuple[OddFragment, ...] = ()


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
                oddest=tuple(reading.oddest.get(step.name, ())),
                odd_fragments=tuple(_odd_fragments(receipts)),
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


def _odd_fragments(receipts: Sequence[AnswersReceipt]) -> list[OddFragment]:
    """The fragments in which a label or failures are far more or less frequent than in all."""
    rows = sum(_answered(receipt) for receipt in receipts)
    whole = total(map(_kinds, receipts))
    found: list[tuple[float, OddFragment]] = []
    for receipt in receipts:
        own = _answered(receipt)
        kinds = _kinds(receipt)
        scored = []
        for what, count in whole.items() if own >= ODD_ROWS else ():
            usual = count / rows
            # Half a row, because a share that nobody expects has no deviation.
            deviation = sqrt(max(usual * (1 - usual), 0.5 / rows) / own)
            share = kinds.get(what, 0) / own
            odd = OddFragment(
                fragment=receipt.fragment, what=what, rows=own, share=share, usual=usual
            )
            scored.append((abs(share - usual) / deviation, odd))
        found += [max(scored, key=itemgetter(0))] if scored else []
    found = [line for line in found if line[0] >= ODD_ERRORS]
    return [odd for _, odd in sorted(found, key=itemgetter(0), reverse=True)[:ODD]]


def _answered(receipt: AnswersReceipt) -> int:
    return receipt.rows - receipt.not_asked


def _kinds(receipt: AnswersReceipt) -> dict[str, int]:
    """The rows of each label, and those that failed."""
    failed = sum(receipt.faults.values())
    return {"failed": failed, **receipt.labels} if failed else dict(receipt.labels)


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
