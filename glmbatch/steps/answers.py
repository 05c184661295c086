"""The columns that every step writes: its answer, why a row has none, and the row's key. No tensors, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from glmbatch.ledger.rowkeys import KEY_BYTES
from glmbatch.settings.job import AnyStep, ClassifyStep
from glmbatch.steps.classify import Choice, choice_columns, choice_fields
from glmbatch.steps.generate import Writing, writing_columns, writing_fields
from glmbatch.steps.prompt import RowFault


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one row: what the model said under the row's key, or why there is nothing (and then no key)."""

    value: Choice | Writing | RowFault
    key: bytes | None = None


def answers_schema(step: AnyStep, head_labels: Sequence[str]) -> pa.Schema:
    """Fields of a step's answers, in the order of `config.answer_columns`; fixed by settings and checkpoint."""
    return pa.schema(
        [
            *(
                choice_fields(step, step.labels or head_labels)
                if isinstance(step, ClassifyStep)
                else writing_fields(step)
            ),
            pa.field(f"{step.name}_error", pa.string()),
            pa.field(f"{step.name}_error_type", pa.string()),
            pa.field(f"{step.name}_key", pa.binary(KEY_BYTES)),
        ]
    )


def answers_table(step: AnyStep, head_labels: Sequence[str], answers: Sequence[Answer]) -> pa.Table:
    """The answers of a step as columns, a row for each answer, in their order."""
    faults = [answer.value if isinstance(answer.value, RowFault) else None for answer in answers]
    if isinstance(step, ClassifyStep):
        choices = [answer.value if isinstance(answer.value, Choice) else None for answer in answers]
        columns = choice_columns(choices)
    else:
        columns = writing_columns(
            [answer.value if isinstance(answer.value, Writing) else None for answer in answers]
        )
    columns += [
        [fault and fault.reason for fault in faults],
        [fault and fault.kind for fault in faults],
        [answer.key for answer in answers],
    ]
    schema = answers_schema(step, head_labels)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)],
        schema=schema,
    )
