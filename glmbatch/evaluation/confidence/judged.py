"""Which answers of a step are right, and how sure the model was of them. No model, no files.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from glmbatch.evaluation.fields import same_values
from glmbatch.evaluation.truth import Truth
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import AnyStep, ExtractStep
from glmbatch.steps.calibration import confidences

# The name of what is judged, the confidences, and whether each answer is right.
Judged = tuple[str, np.ndarray, np.ndarray]


def judged(step: AnyStep, truth: Truth, answers: pa.Table) -> Iterator[Judged]:
    """Each part of `step` with a confidence: the step itself, or each of its labels or fields.

    Rows without an answer, or without a truth, have a confidence that is not a number.
    """
    column = answers.schema.field(Columns(step.name).answer)
    several = pa.types.is_list(column.type)
    for part, confidence_R in confidences(step, answers).items():
        if isinstance(step, ExtractStep):
            if part in truth.values:
                values, _ = field_values(step, part, answers)
                known_R = np.where(truth.known[part], confidence_R, np.nan)
                yield part, known_R, same_values(truth.values[part], values)
        elif several:
            applies = [part in label_list(value) for value in truth.values[step.name]]
            yield part, confidence_R, np.array(applies)
        else:
            values = answers.column(column.name).to_pylist()
            yield part, confidence_R, same_values(truth.values[step.name], values)


def label_list(value: str | list[str]) -> list[str]:
    """The labels of a row; a text is a list of one."""
    return value if isinstance(value, list) else [value]


def field_values(step: ExtractStep, field: str, answers: pa.Table) -> tuple[list[Any], np.ndarray]:
    """The values of a field, and whether the model abstained from each."""
    columns = Columns(step.name)
    if step.layout == "struct":
        values = [row[field] for row in answers.column(columns.answer).to_pylist()]
    else:
        values = answers.column(columns.field(field).answer).to_pylist()
    if columns.abstained not in answers.column_names:
        return values, np.zeros(len(answers), bool)
    lists = answers.column(columns.abstained).to_pylist()
    return values, np.array([field in (fields or ()) for fields in lists])
