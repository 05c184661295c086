"""The columns that every step writes: answer, reason of a failure, row key. Reads no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from glmbatch.ledger.rowkeys import KEY_BYTES
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import AnyStep, ClassifyStep
from glmbatch.steps.classify import Choice, choice_columns, choice_fields
from glmbatch.steps.generate import Writing, writing_columns, writing_fields
from glmbatch.steps.prompt import RowFault


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one row. A row that could not be asked has a fault and no key."""

    value: Choice | Writing | RowFault
    key: bytes | None = None


def answers_schema(step: AnyStep, head_labels: Sequence[str]) -> pa.Schema:
    """Fields of a step's answers, in the order of `answer_columns`.

    Settings and checkpoint alone decide them, so all files of an output have the same.
    """
    columns = Columns(step.name)
    if isinstance(step, ClassifyStep):
        fields = choice_fields(step, step.labels or head_labels)
    else:
        fields = writing_fields(step)
    fields += [
        pa.field(columns.error, pa.string()),
        pa.field(columns.error_type, pa.string()),
        pa.field(columns.key, pa.binary(KEY_BYTES)),
    ]
    return pa.schema(fields)


def answers_table(step: AnyStep, head_labels: Sequence[str], answers: Sequence[Answer]) -> pa.Table:
    """The answers of a step as columns, a row for each answer, in their order."""
    # Each row has one value of the three kinds, and null in the columns of the others.
    choices: list[Choice | None] = []
    writings: list[Writing | None] = []
    reasons: list[object] = []
    kinds: list[object] = []
    for answer in answers:
        value = answer.value
        choices.append(value if isinstance(value, Choice) else None)
        writings.append(value if isinstance(value, Writing) else None)
        reasons.append(value.reason if isinstance(value, RowFault) else None)
        kinds.append(value.kind if isinstance(value, RowFault) else None)
    if isinstance(step, ClassifyStep):
        columns = choice_columns(choices)
    else:
        columns = writing_columns(writings)
    columns += [reasons, kinds, [answer.key for answer in answers]]
    schema = answers_schema(step, head_labels)
    arrays = []
    for column, field in zip(columns, schema, strict=True):
        # The field's type, not the values': a fragment of failures alone has no value to tell it
        # by.
        arrays.append(pa.array(column, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)
