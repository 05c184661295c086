"""What can be seen in a run's answers: how sure, how long, how fast, a few of each label.

Reads small columns of the output files, a few files at a time, and keeps counts: memory does not grow with the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import LENGTH_BIN, AnswersReceipt, OutputReceipt
from glmbatch.report.summary import short
from glmbatch.run.audits import total
from glmbatch.settings.job import AnyStep, ClassifyStep, JobConfig
from glmbatch.store.parquet import prompt_values, read_columns
from glmbatch.store.paths import side_by_side

CONFIDENCE_BINS = 20
LENGTH_BINS = 24
RATE_BINS = 30
SLOWEST = 5
LABELS_SHOWN = 30
SAMPLES_PER_LABEL = 2
SAMPLE_CHARS = 300


class Histogram(BaseModel, frozen=True, extra="forbid"):
    """How many values lie in each bin of the width `width`, from 0 on."""

    width: float
    counts: tuple[int, ...]


class Sample(BaseModel, frozen=True, extra="forbid"):
    """One row: what its prompt was made of, its label, and how sure the model was."""

    text: str
    label: str
    score: float


class Slow(BaseModel, frozen=True, extra="forbid"):
    """What one fragment took."""

    fragment: str
    seconds: float
    computed_rows: int
    tokens: int


class Measures(BaseModel, frozen=True, extra="forbid"):
    """One step over a run. `rates` are rows through the model in a second, by seconds since the run's first."""

    step: str
    histograms: dict[str, Histogram]
    samples: tuple[Sample, ...]
    rates: tuple[tuple[float, float], ...]
    slowest: tuple[Slow, ...]


def measure(job: JobConfig, run: str, outputs: Sequence[OutputReceipt]) -> tuple[Measures, ...]:
    """The measures of each step over `outputs`, staged or published; rates and times are those of `run` alone."""
    ledger = Ledger(job.data.output)
    # By key, since files with the same rows share one receipt.
    receipts = [
        {output.answers[index].key: output.answers[index] for output in outputs}
        for index in range(len(job.steps))
    ]
    busy = [
        [each for each in step.values() if each.run == run and each.computed_rows]
        for step in receipts
    ]
    began = min((each.began for step_busy in busy for each in step_busy), default=0.0)
    return tuple(
        Measures(
            step=step.name,
            histograms=_histograms(step, index, ledger, outputs),
            samples=tuple(_samples(job, step, index, ledger, outputs))
            if isinstance(step, ClassifyStep)
            else (),
            rates=tuple(_rates(busy[index], began)),
            slowest=tuple(
                _slow(each)
                for each in sorted(busy[index], key=lambda each: -each.seconds)[:SLOWEST]
            ),
        )
        for index, step in enumerate(job.steps)
    )


def _slow(receipt: AnswersReceipt) -> Slow:
    tokens = receipt.prompt_tokens + receipt.completion_tokens
    return Slow(
        fragment=receipt.fragment,
        seconds=receipt.seconds,
        computed_rows=receipt.computed_rows,
        tokens=tokens,
    )


def _histograms(
    step: AnyStep, index: int, ledger: Ledger, outputs: Sequence[OutputReceipt]
) -> dict[str, Histogram]:
    found = {"prompt_tokens": _prompt_lengths(output.answers[index] for output in outputs)}
    if isinstance(step, ClassifyStep):
        counts = _counted(ledger, outputs, f"{step.name}_score", CONFIDENCE_BINS)
        counts = np.pad(counts, (0, CONFIDENCE_BINS + 1 - len(counts)))
        counts[-2] += counts[-1]  # a score of 1 belongs to the last bin
        found["score"] = Histogram(width=1 / CONFIDENCE_BINS, counts=counts[:-1].tolist())
    else:
        found["completion_tokens"] = _lengths(
            _counted(ledger, outputs, f"{step.name}_completion_tokens"), 1
        )
    return found


def _prompt_lengths(receipts: Iterable[AnswersReceipt]) -> Histogram:
    rows: Counter[int] = Counter()
    for receipt in receipts:
        rows.update(receipt.prompt_lengths)
    counts = np.zeros(max(rows, default=0) + 1, np.int64)
    counts[list(rows)] = list(rows.values())
    return _lengths(counts, LENGTH_BIN)


def _counted(
    ledger: Ledger, outputs: Sequence[OutputReceipt], column: str, scale: int = 1
) -> np.ndarray:
    """How many values of `column`, times `scale`, lie at each whole number."""

    def counted(output: OutputReceipt) -> np.ndarray:
        values = read_columns(ledger.output_path(output), [column]).column(0).drop_null().to_numpy()
        return np.bincount((values * scale).astype(np.int64))

    counts = np.zeros(0, np.int64)
    for found in side_by_side(ledger.root, counted, outputs):
        longer, shorter = (found, counts) if len(found) > len(counts) else (counts, found)
        longer[: len(shorter)] += shorter
        counts = longer
    return counts


def _lengths(counts: np.ndarray, least: int) -> Histogram:
    """Counts by token, put together in bins of equal width, a multiple of `least`."""
    width = max(1, -(-len(counts) // (LENGTH_BINS * least))) * least
    whole = np.pad(counts, (0, -len(counts) % width))
    return Histogram(width=width, counts=whole.reshape(-1, width).sum(1).tolist())


def _rates(receipts: Sequence[AnswersReceipt], began: float) -> list[tuple[float, float]]:
    """Rows in a second over equal parts of the time in which the model worked; a receipt's rows lie evenly in its."""
    if not receipts:
        return []
    first, last = (
        min(each.began for each in receipts),
        max(each.began + each.seconds for each in receipts),
    )
    width = max(last - first, 1e-6) / RATE_BINS
    points = []
    for number in range(RATE_BINS):
        left, right = first + number * width, first + (number + 1) * width
        rows = sum(
            each.computed_rows
            * max(0.0, min(right, each.began + each.seconds) - max(left, each.began))
            / each.seconds
            for each in receipts
            if each.seconds
        )
        points.append(((left + right) / 2 - began, rows / width))
    return points


def _samples(
    job: JobConfig, step: ClassifyStep, index: int, ledger: Ledger, outputs: Sequence[OutputReceipt]
) -> list[Sample]:
    """The first rows of each of the most frequent labels, found by the counts in the receipts."""
    columns = list(dict.fromkeys(job.source_columns(step).values()))
    labels = list(total(output.answers[index].labels for output in outputs))[:LABELS_SHOWN]
    found: dict[str, list[Sample]] = {label: [] for label in labels}
    for output in outputs:
        here = output.answers[index].labels
        wanted = [
            label for label in labels if label in here and len(found[label]) < SAMPLES_PER_LABEL
        ]
        if wanted:
            table = read_columns(
                ledger.output_path(output), [*columns, step.name, f"{step.name}_score"]
            )
            for label in wanted:
                _take_samples(table, columns, step.name, label, found[label])
    return [sample for samples in found.values() for sample in samples]


def _take_samples(
    table: pa.Table, columns: Sequence[str], step: str, label: str, samples: list[Sample]
) -> None:
    rows = [row for row, seen in enumerate(table.column(step).to_pylist()) if seen == label]
    for row in rows[: SAMPLES_PER_LABEL - len(samples)]:
        values = [str(prompt_values(table.column(column).slice(row, 1))[0]) for column in columns]
        text = short(" · ".join(values), SAMPLE_CHARS)
        samples.append(
            Sample(text=text, label=label, score=table.column(f"{step}_score")[row].as_py())
        )
