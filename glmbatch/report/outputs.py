"""One pass over the output files of a run: each is opened once, for only the columns needed.

The receipts already say which files have rows of a label and which have failed rows. So only a few
files are read for their texts, and memory does not grow with the number of rows. Which rows are the
oddest is known only after the pass: their files, ODDEST for a step at most, are opened once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import OutputReceipt
from glmbatch.report.counts import total
from glmbatch.report.oddest import (
    SAMPLE_CHARS,
    Extreme,
    OddRow,
    extremes_of,
    most_extreme,
    odd_rows,
)
from glmbatch.report.summary import short
from glmbatch.settings.columns import Columns
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.parquet import read_columns
from glmbatch.store.types import take_rows
from glmbatch.store.values import prompt_values

# Few enough to read on one page.
SAMPLE_ROWS = 3
SAMPLES_PER_LABEL = 2
LABELS_SHOWN = 30
# Bins of 0.05 from 0 to 1.
CONFIDENCE_BINS = 20


class Sample(BaseModel, frozen=True, extra="forbid"):
    """One row: the texts in its prompt, its label, and the score of the label."""

    text: str
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class ReportedStep:
    """What a report needs to know about a step; `sources` are the source columns of its prompt."""

    name: str
    classifies: bool
    sources: tuple[str, ...]
    gives_number: bool = False

    @property
    def measured(self) -> str | None:
        """Name of the column that the report shows as a histogram; a number has any scale."""
        columns = Columns(self.name)
        if self.gives_number:
            return None
        return columns.score if self.classifies else columns.completion_tokens


@dataclass(slots=True)
class Reading:
    """What was read from one output file, or from all of them.

    counts     by step: how often each whole number occurs, of generated tokens, or of scores
               times CONFIDENCE_BINS
    labelled   by step: a few rows of each label
    extremes   by step: the most extreme rows, the most extreme first, and where they are
    oddest     by step: the same rows with their texts
    rows       a few answered rows without a failure, with the values of prompts and answers
    failures   one entry for each failed row and step
    """

    counts: dict[str, np.ndarray] = field(default_factory=dict)
    labelled: dict[str, list[Sample]] = field(default_factory=dict)
    extremes: dict[str, list[Extreme]] = field(default_factory=dict)
    oddest: dict[str, list[OddRow]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What to read from one output file: a number of `rows`, and of rows per label by step."""

    output: OutputReceipt
    rows: int
    labels: Mapping[str, Mapping[str, int]]


def read_outputs(
    steps: Sequence[ReportedStep],
    outputs: Sequence[OutputReceipt],
    ledger: Ledger,
    id_column: str | None,
    most_failures: int | None = None,
) -> Reading:
    """What the report and the list of failed rows need from `outputs`, staged or published.

    Keeps at most `most_failures` failures, or all if it is None. UnusableFile if a file cannot be
    read or lacks a column.
    """

    def read(wanted: _Wanted) -> Reading:
        path = ledger.outputs.path(wanted.output)
        given = folder_columns(wanted.output.fragment.source)
        table = read_columns(path, _columns(wanted, steps, id_column), given)
        return _read(table, wanted, steps, id_column)

    merged = Reading()
    # One at a time on a disk, several at once in an object store; always in order.
    for reading in ledger.folder.map(read, _plan(steps, outputs)):
        for name, counts in reading.counts.items():
            merged.counts[name] = _added(merged.counts.get(name), counts)
        for name, samples in reading.labelled.items():
            merged.labelled.setdefault(name, []).extend(samples)
        for name, extremes in reading.extremes.items():
            merged.extremes[name] = most_extreme([*merged.extremes.get(name, ()), *extremes])
        merged.rows += reading.rows
        room = None if most_failures is None else most_failures - len(merged.failures)
        merged.failures += reading.failures[:room]
    # Files are in row order, but the page shows the most frequent label first.
    for index, step in enumerate(steps):
        if step.name in merged.labelled:
            order = _shown_labels(outputs, index)
            merged.labelled[step.name].sort(key=lambda sample: order.index(sample.label))
        names = list(dict.fromkeys(step.sources))
        extremes = merged.extremes.get(step.name, [])
        merged.oddest[step.name] = odd_rows(extremes, names, Columns(step.name).answer, ledger)
    return merged


def _shown_labels(outputs: Sequence[OutputReceipt], index: int) -> list[str]:
    """The LABELS_SHOWN most frequent labels of a step, most frequent first."""
    return list(total(output.answers[index].labels for output in outputs))[:LABELS_SHOWN]


def _plan(steps: Sequence[ReportedStep], outputs: Sequence[OutputReceipt]) -> Iterator[_Wanted]:
    """What to read from each output; samples of a label come from the first files that have it."""
    missing: dict[str, Counter[str]] = {}
    for index, step in enumerate(steps):
        labels = _shown_labels(outputs, index)
        missing[step.name] = Counter(dict.fromkeys(labels, SAMPLES_PER_LABEL))
    # Prompts without columns have no text to show next to the answers.
    rows = SAMPLE_ROWS if any(step.sources for step in steps) else 0
    for output in outputs:
        labels_here = {}
        for index, step in enumerate(steps):
            taken = missing[step.name] & Counter(output.answers[index].labels)
            missing[step.name] -= taken
            labels_here[step.name] = taken
        has_sound_rows = output.faulty_rows < output.fragment.rows
        yield _Wanted(output, rows if has_sound_rows else 0, labels_here)
        if has_sound_rows:
            rows = 0  # the first such fragment is enough


def _columns(wanted: _Wanted, steps: Sequence[ReportedStep], id_column: str | None) -> list[str]:
    """The columns to read for `wanted`, each once."""
    names: list[str] = []
    for step in steps:
        columns = Columns(step.name)
        if step.measured is not None:
            names.append(step.measured)
        # Texts are most of a file; the other columns are small.
        if wanted.rows or wanted.labels[step.name]:
            names += [*step.sources, columns.answer]
        if wanted.rows or wanted.output.faulty_rows:
            names += [columns.error, columns.error_type]
    if wanted.output.faulty_rows and id_column is not None:
        names.append(id_column)
    return list(dict.fromkeys(names))


def _read(
    table: pa.Table, wanted: _Wanted, steps: Sequence[ReportedStep], id_column: str | None
) -> Reading:
    """The reading of one output, from a `table` with the wanted columns."""
    reading = Reading()
    for step in steps:
        if step.measured is not None:
            # Counts take 8 bytes per bin, however many rows there are.
            scale = CONFIDENCE_BINS if step.classifies else 1
            values = table.column(step.measured).drop_null().to_numpy()
            reading.counts[step.name] = np.bincount((values * scale).astype(np.int64))
            reading.extremes[step.name] = extremes_of(
                table.column(step.measured), wanted.output, lowest=step.classifies
            )
        if wanted.labels[step.name]:
            reading.labelled[step.name] = list(_samples(table, step, wanted.labels[step.name]))
    if wanted.rows:
        reading.rows = _rows_without_fault(table, steps, wanted.rows)
    if wanted.output.faulty_rows:
        reading.failures = list(_failures(table, wanted.output, steps, id_column))
    return reading


def _samples(table: pa.Table, step: ReportedStep, numbers: Mapping[str, int]) -> Iterator[Sample]:
    """The first rows of each label; `numbers` says how many."""
    columns = Columns(step.name)
    answers = table.column(columns.answer).to_pylist()
    for label, number in numbers.items():
        rows = (row for row, answer in enumerate(answers) if _has_label(answer, label))
        for row in islice(rows, number):
            texts = [str(_value(table, source, row)) for source in dict.fromkeys(step.sources)]
            text = short(" · ".join(texts), SAMPLE_CHARS)
            yield Sample(text=text, label=label, score=table.column(columns.score)[row].as_py())


def _has_label(answer: str | list[str] | None, label: str) -> bool:
    return label in answer if isinstance(answer, list) else answer == label


def _rows_without_fault(
    table: pa.Table, steps: Sequence[ReportedStep], most: int
) -> list[dict[str, Any]]:
    """The first answered rows on which no step failed, with the values of prompts and answers."""
    is_sound = pa.chunked_array([np.ones(len(table), bool)])
    is_answered = pc.invert(is_sound)
    names: list[str] = []
    for step in steps:
        is_sound = pc.and_(is_sound, pc.is_null(table.column(Columns(step.name).error)))
        is_answered = pc.or_(is_answered, pc.is_valid(table.column(step.name)))
        names += step.sources
    names = list(dict.fromkeys([*names, *(step.name for step in steps)]))
    rows = []
    for row in _numbers_of(pc.and_(is_sound, is_answered))[:most]:
        rows.append({name: _value(table, name, row) for name in names})
    return rows


def _failures(
    table: pa.Table,
    output: OutputReceipt,
    steps: Sequence[ReportedStep],
    id_column: str | None,
) -> Iterator[dict[str, Any]]:
    """One entry for each failed row and step."""
    fragment = output.fragment
    for step in steps:
        columns = Columns(step.name)
        rows = _numbers_of(pc.is_valid(table.column(columns.error)))
        failed = take_rows(table, rows)
        kinds = failed.column(columns.error_type).to_pylist()
        reasons = failed.column(columns.error).to_pylist()
        names: list[Any] = [None] * len(rows)
        if id_column is not None:
            names = prompt_values(failed.column(id_column))
        numbers = fragment.numbers[np.array(rows, np.int64)].tolist()
        for row, name, kind, reason in zip(numbers, names, kinds, reasons, strict=True):
            yield {
                "source": fragment.source,
                "row": row,
                "id": None if name is None else str(name),
                "step": step.name,
                "error_type": kind,
                "error": reason,
            }


def _numbers_of(mask: pa.ChunkedArray) -> list[int]:
    """The indexes of the rows where `mask` is true."""
    numbers: list[int] = pc.indices_nonzero(mask).to_pylist()
    return numbers


def _value(table: pa.Table, column: str, row: int) -> str | bytes | None:
    return prompt_values(table.column(column).slice(row, 1))[0]


def _added(counts: np.ndarray | None, more: np.ndarray) -> np.ndarray:
    """The sum of two counts of different lengths."""
    if counts is None:
        return more
    longer, shorter = sorted((counts, more), key=len, reverse=True)
    longer[: len(shorter)] += shorter
    return longer
