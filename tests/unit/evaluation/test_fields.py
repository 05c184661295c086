"""Fields of an extract step are scored by their types."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from glmbatch.evaluation.bootstrap import Compared, groups_of
from glmbatch.evaluation.fields import same_values, score_field
from glmbatch.evaluation.results import LabelResult, ListResult, TextResult, ValueResult
from glmbatch.settings.steps.fields import ExtractField


def scored(settings: dict[str, Any], truth: list[Any], answers: list[Any]) -> Any:
    field = ExtractField.model_validate({"name": "field", **settings})
    compared = Compared(truth, answers, groups_of(range(len(truth))))
    return score_field(field, compared, ())


def test_numbers_are_compared_and_measured() -> None:
    found = scored({"type": "integer", "nullable": True}, [1, 5, None, 2], [1, 3, None, None])
    assert isinstance(found, ValueResult)
    assert (found.exact_match, found.mean_absolute_error) == (0.5, 1.0)
    assert scored({"type": "boolean"}, [True, False], [True, True]).mean_absolute_error is None
    days = [date(2026, 1, 2), date(2026, 1, 3)]
    assert scored({"type": "date"}, days, days[:1] * 2).exact_match == 0.5


def test_choices_are_scored_as_labels() -> None:
    settings = {"choices": ["red", "blue"], "nullable": True}
    found = scored(settings, ["red", None, "blue"], ["red", "blue", "blue"])
    assert isinstance(found, LabelResult)
    assert found.confusion["null"]["blue"] == 1 and found.accuracy == pytest.approx(2 / 3)


def test_texts_are_scored_as_written_ones() -> None:
    found = scored({"type": "text", "nullable": True}, ["abc", None, "x"], [" abc", None, "y"])
    assert isinstance(found, TextResult)
    assert found.exact_match == pytest.approx(2 / 3)


def test_items_of_lists_are_counted_in_any_order() -> None:
    truth, answers = [["a", "b", "a"], [], None], [["b", "a"], ["c"], []]
    found = scored({"type": "list", "items": "text", "nullable": True}, truth, answers)
    assert isinstance(found, ListResult)
    assert (found.precision, found.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.exact_match == 0  # a null is not an empty list
    assert same_values([["a ", "b"]], [["b", "a"]]).all()
