"""The answers of a step or of its fields, what is right, and which of them are. Asks no model.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from glmbatch.evaluation.confidence.judged import field_values
from glmbatch.evaluation.differences import Kind, without_nulls
from glmbatch.evaluation.fields import same_values
from glmbatch.evaluation.truth import Truth
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import AnyStep, ClassifyStep, ExtractStep


@dataclass(frozen=True, slots=True)
class Answers:
    """One job's answers to a step, or the values of a field, and which rows have one."""

    kind: Kind
    values: Sequence[Any]
    answered_R: np.ndarray


def answers_of(step: AnyStep, answers: pa.Table) -> dict[str, Answers]:
    """The answers of a step, or of each field, by its name."""
    kinds = answers.column(Columns(step.name).error_type).to_pylist()
    answered_R = np.array([kind is None for kind in kinds], bool)
    if isinstance(step, ExtractStep):
        found = {}
        for field in step.fields:
            values, is_missing = _values(step, field.name, answers, answered_R)
            shapes: dict[str, Kind] = {"choice": "labels", "text": "text", "list": "list"}
            kind = shapes.get(field.type, "value")
            found[field.name] = Answers(kind, values, answered_R & ~is_missing)
        return found
    column = answers.column(step.name)
    return {step.name: Answers(_kind_of(step, column.type), column.to_pylist(), answered_R)}


def _values(
    step: ExtractStep, field: str, answers: pa.Table, answered_R: np.ndarray
) -> tuple[list[Any], np.ndarray]:
    """The values of a field in all rows, and where an answer lacks it."""
    rows = np.flatnonzero(answered_R)
    values, missing = field_values(step, field, answers.take(pa.array(rows, pa.int64())))
    of_rows: list[Any] = [None] * len(answers)
    missing_R = np.zeros(len(answers), bool)
    for row, value, is_missing in zip(rows.tolist(), values, missing.tolist(), strict=True):
        of_rows[row], missing_R[row] = value, is_missing
    return of_rows, missing_R


def _kind_of(step: AnyStep, kind: pa.DataType) -> Kind:
    if not isinstance(step, ClassifyStep):
        return "text"
    if pa.types.is_floating(kind):  # a head that estimates a number
        return "value"
    return "several labels" if pa.types.is_list(kind) else "labels"


def expected_of(kind: Kind, name: str, truth: Truth | None) -> Answers | None:
    """What is right, in the form that answers of this kind have; None if nothing says so."""
    if truth is None or name not in truth.values:
        return None
    values: list[Any] = []
    for value in truth.values[name]:
        if kind == "several labels" and isinstance(value, str):
            values.append([value])
        elif kind == "labels" and isinstance(value, list):
            values.append("; ".join(value))  # more than one label is never right
        else:
            values.append(value)
    return Answers(kind, values, np.array(truth.known[name], bool))


def right_rows(answers: Answers, expected: Answers) -> np.ndarray:
    """The rows whose answer is right."""
    kind = answers.kind
    right_R = same_values(without_nulls(kind, expected.values), without_nulls(kind, answers.values))
    right_R &= answers.answered_R & expected.answered_R
    return right_R
