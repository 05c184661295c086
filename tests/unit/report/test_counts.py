"""Counts over receipts: sums, busy time, and the drift of label shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report.counts import (
    RATED_ROWS,
    busy_seconds,
    latest_rate,
    population_stability,
    total,
)

COUNTS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 1000), min_size=1)


def receipt(began: float, seconds: float, computed_rows: int) -> AnswersReceipt:
    return AnswersReceipt(
        key="k",
        run="r",
        fragment="a.parquet@0",
        step="mood",
        step_key="s",
        rows=8,
        computed_rows=computed_rows,
        began=began,
        seconds=seconds,
    )


def test_overlapping_busy_time_counts_once() -> None:
    assert busy_seconds([receipt(100, 5, 8), receipt(103, 4, 8)]) == 7


def test_fragments_without_inference_are_not_busy() -> None:
    assert busy_seconds([receipt(100, 5, 8), receipt(10, 4, 0)]) == 5
    assert busy_seconds([receipt(10, 4, 0)]) == 0
    assert busy_seconds([]) == 0


def test_a_run_of_a_few_rows_gives_no_rate() -> None:
    few = receipt(300, 9, 2).model_copy(update={"run": "few", "key": "few"})
    assert latest_rate([]) is None
    assert latest_rate([few]) is None
    # Of fragments that share a receipt, its rows count once.
    assert latest_rate([few] * RATED_ROWS) is None
    parts = []
    for number in range(2):
        part = receipt(100 + 5 * number, 5, RATED_ROWS // 2)
        parts.append(part.model_copy(update={"key": f"part {number}"}))
    assert latest_rate(parts[:1]) is None
    assert latest_rate([*parts, few]) == RATED_ROWS / 10


def test_sums_are_listed_largest_first() -> None:
    assert list(total([{"a": 1, "b": 2}, {"b": 1, "c": 5}]).items()) == [
        ("c", 5),
        ("b", 3),
        ("a", 1),
    ]


def test_the_index_of_a_known_shift() -> None:
    """Shares move from 0.8 and 0.2 to 0.6 and 0.4: 0.2 ln(4/3) + 0.2 ln 2."""
    index = population_stability({"a": 80_000, "b": 20_000}, {"a": 60_000, "b": 40_000})
    assert index == pytest.approx(0.2 * 0.28768207 + 0.2 * 0.69314718, rel=1e-4)


@given(before=COUNTS, now=COUNTS)
def test_the_index_is_symmetric(before: dict[str, int], now: dict[str, int]) -> None:
    index = population_stability(before, now)
    assert index >= 0
    assert index == pytest.approx(population_stability(now, before))


@given(counts=COUNTS)
def test_the_index_of_equal_shares_is_0(counts: dict[str, int]) -> None:
    assert population_stability(counts, counts) == 0
