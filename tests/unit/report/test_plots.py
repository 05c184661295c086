"""The axes of plots have round numbers, and drawn texts never act as markup."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.report.page.plots import TICKS, Axis, bars, histogram, lines, round_numbers

NUMBERS = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-6)


def test_values_that_differ_by_rounding_alone_are_drawn() -> None:
    points = [(1.0, 0.975), (2.0, 0.975 + 2e-16), (3.0, 0.975 - 2e-13), (4.0, 0.975)]
    assert "0.975" in lines("confidence", Axis("run"), Axis("mean score"), [("mood", points)])
    assert len(set(round_numbers(0.975 - 2e-13, 0.975))) > 1


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [
        (0, 2480, [0, 500, 1000, 1500, 2000, 2500]),
        (0, 0.4736, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (0.31, 0.34, [0.31, 0.315, 0.32, 0.325, 0.33, 0.335, 0.34]),
        (0, 0.6, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, numbers: list[float]) -> None:
    assert round_numbers(low, high) == pytest.approx(numbers)


@given(low=NUMBERS, high=NUMBERS)
def test_the_numbers_of_an_axis_cover_its_values(low: float, high: float) -> None:
    low, high = sorted((low, high))
    numbers = round_numbers(low, high)
    spread = max(high - low, abs(low))
    assert numbers[0] <= low + 1e-6 * spread and numbers[-1] >= high - 1e-6 * spread
    assert 2 <= len(numbers) <= TICKS + 2


def test_counts_have_whole_steps() -> None:
    assert round_numbers(0, 2, least=1) == [0, 1, 2]


HOSTILE = "<script>alert(1)</script>\x00\n\ud7ff&\"'"


def test_names_of_any_kind_stay_text() -> None:
    plots = [
        bars(HOSTILE, Axis(HOSTILE), [HOSTILE, "b"], [(HOSTILE, [1, 2]), ("now", [0, 1])]),
        lines(HOSTILE, Axis("", names=[HOSTILE, "b"]), Axis(HOSTILE), [(HOSTILE, [(1, 2)])]),
        histogram(HOSTILE, Axis(HOSTILE), Axis("rows", least=1), 0.5, [1, 2]),
    ]
    for plot in plots:
        assert "<script" not in plot and "&lt;script" in plot
        assert not re.search(r" (on\w+|href|src)=", plot)


def test_plots_without_values_are_left_out() -> None:
    axis = Axis("x")
    assert lines("t", axis, axis, [("a", [])]) == ""
    assert histogram("t", axis, axis, 1, [0, 0]) == ""
    assert bars("t", axis, ["a"], [("now", [0])]) == ""
