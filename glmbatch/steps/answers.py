"""The columns that every step writes: answer, reason for a failure, row key. Reads no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from glmbatch.ledger.rowkeys import KEY_BYTES
from glmbatch.settings.columns import ABSTAINED, NO_ERRORS, NOT_ASKED, Columns
from glmbatch.settings.job import AnyStep, ClassifyStep, ExtractStep
from glmbatch.steps.classify import Choice, Number, Selection, choice_columns, choice_fields
from glmbatch.steps.extract import (
    Extraction,
    extraction_columns,
    extraction_fields,
    is_blank,
)
from glmbatch.steps.generate import Writing, writing_columns, writing_fields
from glmbatch.steps.prompt import NoPrompt, NotAsked, RowFault


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one row, and its row key. A row without a prompt has no key."""

    value: Choice | Selection | Number | Writing | Extraction | NoPrompt
    key: bytes | None = None


def answers_schema(step: AnyStep, head_labels: Sequence[str]) -> pa.Schema:
    """The fields of a step's answers, in the order of its `answer_columns`.

    They depend only on the settings and the checkpoint, so they are the same in all files of an
    output. `head_labels` are the labels of a trained head, used if the step has none.
    """
    columns = Columns(step.name)
    if isinstance(step, ClassifyStep):
        fields = choice_fields(step, step.labels or head_labels)
    elif isinstance(step, ExtractStep):
        fields = extraction_fields(step)
    else:
        fields = writing_fields(step)
    fields += [
        pa.field(columns.error, pa.string()),
        pa.field(columns.error_type, pa.string()),
        pa.field(columns.key, pa.binary(KEY_BYTES)),
    ]
    return pa.schema(fields)


def answers_table(step: AnyStep, head_labels: Sequence[str], answers: Sequence[Answer]) -> pa.Table:
    """A table with `answers_schema` and a row for each of `answers`, in their order."""
    # Each row has one value of several kinds, and null in the columns of the other kinds.
    choices: list[Choice | Selection | Number | None] = []
    writings: list[Writing | None] = []
    extractions: list[Extraction | None] = []
    reasons: list[object] = []
    kinds: list[object] = []
    for answer in answers:
        value = answer.value
        choices.append(value if isinstance(value, Choice | Selection | Number) else None)
        writings.append(value if isinstance(value, Writing) else None)
        extractions.append(value if isinstance(value, Extraction) else None)
        reasons.append(value.reason if isinstance(value, RowFault) else None)
        kinds.append(kind_of(value))
    if isinstance(step, ClassifyStep):
        columns = choice_columns(step, choices)
    elif isinstance(step, ExtractStep):
        columns = extraction_columns(step, extractions)
    else:
        columns = writing_columns(step, writings)
    columns += [reasons, kinds, [answer.key for answer in answers]]
    schema = answers_schema(step, head_labels)
    arrays = []
    for column, field in zip(columns, schema, strict=True):
        # With the field's type: a fragment in which every row failed has no values to infer it.
        arrays.append(pa.array(column, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def kind_of(value: Choice | Selection | Number | Writing | Extraction | NoPrompt) -> str | None:
    """Why there is no answer, as a short code; None if there is one."""
    if isinstance(value, RowFault):
        return value.kind
    if isinstance(value, NotAsked):
        return NOT_ASKED
    answer = value.text if isinstance(value, Writing | Extraction) else value.answer
    return ABSTAINED if answer is None else None


class AnswerCounter:
    """Counts the answers to `step` in a table by kind, for any range of its rows."""

    def __init__(self, step: AnyStep, table: pa.Table) -> None:
        columns = Columns(step.name)
        self._classifies = isinstance(step, ClassifyStep)
        self._is_empty = is_blank if isinstance(step, ExtractStep) else _is_white
        names = [columns.error_type, columns.answer]
        if not self._classifies:
            names += [columns.finish_reason, columns.completion_tokens]
        # Python lists, because each Arrow call on a part of a few rows costs more than its rows.
        self._columns = [table.column(name).to_pylist() for name in names]

    def count(self, rows: slice) -> dict[str, Any]:
        """The fields of a receipt that count the answers in `rows`."""
        kinds, answers, *rest = (_present(column[rows]) for column in self._columns)
        faults = Counter(kinds)
        counts: dict[str, Any] = {name: faults.pop(name, 0) for name in NO_ERRORS}
        counts["faults"] = faults
        if self._classifies:
            labels: Counter[str] = Counter()
            for answer in answers:
                if not isinstance(answer, float):  # a number is no label
                    labels.update([answer] if isinstance(answer, str) else answer)
            return {**counts, "labels": labels, "unlabelled": answers.count([])}
        finish_reasons, tokens = rest
        empty = [answer for answer in answers if self._is_empty(answer)]
        return {
            **counts,
            "finish_reasons": Counter(finish_reasons),
            "empty_answers": len(empty),
            "answer_tokens": sum(tokens),
        }


def _is_white(text: str) -> bool:
    # Blank counts as empty: an answer of spaces alone is useless to a reader.
    return not text.strip()


def _present(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]
