"""The labelled rows of a job: what is right for each step, and which rows are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from glmbatch.errors import InputError, some_of
from glmbatch.evaluation.truth import (
    Truth,
    check_names,
    columns_to_read,
    read_labelled_rows,
    truth_of,
)
from glmbatch.run.promotion.kept import TEXT_CHARS, digest
from glmbatch.settings.job import AnyStep, EvaluateConfig
from glmbatch.store.inputs.needs import SchemaNeeds

TRUTH = "evaluate.truth"


@dataclass(frozen=True, slots=True)
class Labelled:
    """Labelled rows: what is right for each step that has a truth, and the id of each row by step.

    Rows with the same text have ids that begin alike. `columns` has a digest of each column that
    the job reads.
    """

    table: pa.Table
    truths: Mapping[str, Truth]
    ids: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, str]

    def digest_of(self, columns: Iterable[str]) -> str:
        """A digest of the values in `columns`."""
        return digest([self.columns.get(name) for name in sorted(columns)])


def read_labelled(
    config: EvaluateConfig, steps: Sequence[AnyStep], text_column: str, needs: SchemaNeeds
) -> Labelled:
    """The labelled rows of a job. InputError if no step has a truth there."""
    names = [step.name for step in steps]
    if isinstance(config.least_score, dict):
        for name in config.least_score:
            if name not in names:
                raise InputError(
                    f"evaluate.least_score: the job has no step {name!r}; it has "
                    f"{some_of(names, name)}."
                )
    given = config.truth
    read = {column.name for column in needs.read}
    check_names(steps, given, TRUTH)
    wanted, places = columns_to_read(steps, given, read, text_column)
    table, every = read_labelled_rows(config.rows, wanted, "evaluate.rows")
    truths = {}
    for step in steps:
        truth = truth_of(step, table, places[step.name], given, TRUTH)
        if truth is not None and any(truth.known_rows):
            truths[step.name] = truth
    if not truths:
        raise InputError(
            f"{config.rows}: no column has the truth of a step; it has {some_of(every)}. "
            f"Name one for each step, such as {TRUTH}: {{{names[0]}: COLUMN}}."
        )
    texts: Iterable[object] = range(len(table))  # without the text column, the place tells a row
    if text_column in table.column_names:
        texts = table.column(text_column).to_pylist()
    begins = [digest(str(text))[:TEXT_CHARS] for text in texts]
    ids = {name: _ids(begins, truth) for name, truth in truths.items()}
    columns = {
        name: digest(table.column(name).to_pylist()) for name in read & {*table.column_names}
    }
    return Labelled(table, truths, ids, columns)


def _ids(begins: Sequence[str], truth: Truth) -> tuple[str, ...]:
    """An id for each row, made of its text, its truth, and how many such rows came before."""
    counts = Counter[str]()
    ids = []
    for row, begin in enumerate(begins):
        expected = {name: values[row] for name, values in truth.values.items()}
        own = begin + digest(expected)[:8]
        ids.append(f"{own}.{counts[own]}")
        counts[own] += 1
    return tuple(ids)
