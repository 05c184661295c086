"""Extracted fields, each by its type: the cells of truth columns, and scores. No model, no files.

Shapes: R rows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime
from typing import Any

import numpy as np

from glmbatch.errors import InputError, shown, some_of
from glmbatch.evaluation.bootstrap import Compared, Measure, intervals, whole
from glmbatch.evaluation.confidence.thresholds import coverages
from glmbatch.evaluation.labels import score_labels
from glmbatch.evaluation.results import ListResult, Result, ValueResult
from glmbatch.evaluation.texts import score_written
from glmbatch.settings.steps.extract import ExtractStep
from glmbatch.settings.steps.fields import ExtractField

NULL = "null"  # how a null is named among choices
UNSAID = object()  # the truth of a field that its object does not have
BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def objects_of(step: ExtractStep, cells: Sequence[Any], where: str) -> list[dict[str, Any] | None]:
    """The cells of a truth column: structs, or JSON objects as text, of the fields of `step`.

    InputError, naming `where`, if one is something else.
    """
    names = {field.name for field in step.fields}
    objects = []
    for row, cell in enumerate(cells):
        found = cell
        with suppress(ValueError):
            found = json.loads(cell) if isinstance(cell, str) else cell
        if found is not None and not isinstance(found, dict):
            raise InputError(
                f"{where} has {shown(repr(cell))} in row {row}, which is no object of fields. "
                "Correct it, or name a column for each field."
            )
        objects.append(found)
    every = set().union(*filter(None, objects))
    if every and not every & names:
        raise InputError(
            f"{where} has objects with {some_of(sorted(every))}, and the step's fields are "
            f"{some_of(sorted(names))}. Name another column, or one for each field."
        )
    return objects


def values_of(field: ExtractField, cells: Sequence[Any], where: str) -> list[Any]:
    """The cells of a truth column as the field's answers have them; None for those UNSAID.

    InputError, naming `where`, if one cannot be.
    """
    kind = field.type if field.items is None else field.items.type
    values: list[Any] = []
    for row, cell in enumerate(cells):
        if cell is None or cell is UNSAID:
            values.append(None)
            continue
        try:
            if field.items is None:
                values.append(_plain(cell, kind))
            else:
                values.append([_plain(item, kind) for item in _items(cell) if item is not None])
        except (KeyError, ValueError, TypeError) as error:
            held = kind if field.items is None else f"list of {kind}"
            raise InputError(
                f"{where} has {shown(repr(cell))} in row {row}, which is not the {held} that field "
                f"{field.name!r} holds. Correct it, or name another column."
            ) from error
    return values


def _items(cell: Any) -> list[Any]:
    """A list, or one in JSON. ValueError or TypeError for anything else."""
    items = json.loads(cell) if isinstance(cell, str) else cell
    if not isinstance(items, list):
        raise TypeError(items)
    return items


def _plain(value: Any, kind: str) -> Any:
    if isinstance(value, list | dict):
        raise TypeError(value)
    if kind == "boolean":
        return BOOLEANS[str(value).strip().lower()]
    if kind == "date":
        if isinstance(value, datetime):
            return value.date()
        return value if isinstance(value, date) else date.fromisoformat(str(value).strip())
    if kind in ("integer", "number"):
        number = float(value)
        if kind == "integer" and not number.is_integer():
            raise ValueError(value)
        return int(number) if kind == "integer" else number
    return str(value)


def same_values(truth: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
    """Whether each value of a field is right. White space at the ends of a text is ignored."""
    pairs = zip(truth, answers, strict=True)
    return np.array([_bare(one) == _bare(other) for one, other in pairs])


def _bare(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return Counter(map(_bare, value))  # the order of items says nothing
    return value


def score_field(field: ExtractField, compared: Compared, precisions: Sequence[float]) -> Result:
    """Scores of one field, by its type, and the rows covered at each of `precisions`."""
    truth, answers, group_R = compared.truth, compared.answers, compared.group_R
    if field.type == "choice":
        labels = [*(field.choices or ()), *([NULL] if field.nullable else [])]
        named = replace(compared, truth=filled(truth, NULL), answers=filled(answers, NULL))
        return score_labels(named, labels, precisions)
    right_R = same_values(truth, answers)
    coverage = coverages(precisions, compared.confidence, right_R, group_R)
    if field.type == "text":  # a null is as good as an empty text
        result: Result = score_written(filled(truth, ""), filled(answers, ""), group_R)
    elif field.type == "list":
        result = score_items(truth, answers, group_R)
    else:
        result = score_values(truth, answers, group_R)
    return result.model_copy(update={"coverage": coverage})


def filled(values: Sequence[Any], instead: str) -> list[str]:
    """The values as texts, with one `instead` of each null."""
    return [instead if value is None else value for value in values]


def score_values(truth: Sequence[Any], answers: Sequence[Any], group_R: np.ndarray) -> ValueResult:
    """How often values are right; for numbers also how far off they are."""
    measure = measure_values(truth, answers)
    found = dict(whole(measure, len(truth)))
    error = found.pop("mean_absolute_error")
    return ValueResult(
        rows=len(truth),
        **found,
        mean_absolute_error=None if math.isnan(error) else error,
        intervals=intervals(measure, group_R),
    )


def measure_values(truth: Sequence[Any], answers: Sequence[Any]) -> Measure:
    """The numbers of values by the number of times that each row is drawn."""
    exact_R = same_values(truth, answers).astype(np.float64)
    off_R = np.array([_distance(one, other) for one, other in zip(truth, answers, strict=True)])
    compares_R = np.isfinite(off_R)
    off_R = np.where(compares_R, off_R, 0.0)

    def measure(times_R: np.ndarray) -> dict[str, float]:
        numbers = times_R @ compares_R
        return {
            "exact_match": float(times_R @ exact_R / times_R.sum()),
            "mean_absolute_error": float(times_R @ off_R / numbers) if numbers else math.nan,
        }

    return measure


def _distance(truth: Any, answer: Any) -> float:
    for value in (truth, answer):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return math.nan
    return abs(float(truth) - float(answer))


def score_items(
    truth: Sequence[list[Any] | None], answers: Sequence[list[Any] | None], group_R: np.ndarray
) -> ListResult:
    """How well the items of lists agree; null counts as a list without items."""
    measure = measure_items(truth, answers)
    return ListResult(
        rows=len(truth), **whole(measure, len(truth)), intervals=intervals(measure, group_R)
    )


def measure_items(
    truth: Sequence[list[Any] | None], answers: Sequence[list[Any] | None]
) -> Measure:
    """The numbers of lists by the number of times that each row is drawn."""
    exact_R = same_values(truth, answers).astype(np.float64)
    counts = []
    for expected, answered in zip(truth, answers, strict=True):
        one, other = _bare(expected or []), _bare(answered or [])
        counts.append([(one & other).total(), other.total(), one.total()])
    counts_R3 = np.array(counts, np.float64)

    def measure(times_R: np.ndarray) -> dict[str, float]:
        common, answered, expected = times_R @ counts_R3
        return {
            "exact_match": float(times_R @ exact_R / times_R.sum()),
            "precision": float(common / max(answered, 1)),
            "recall": float(common / max(expected, 1)),
            "f1": float(2 * common / max(answered + expected, 1)),
        }

    return measure
