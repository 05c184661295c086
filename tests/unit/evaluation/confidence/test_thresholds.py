"""Thresholds for a precision hold on rows that they were not chosen on."""

from __future__ import annotations

import numpy as np
import pytest

from glmbatch.evaluation.bootstrap import groups_of
from glmbatch.evaluation.confidence.thresholds import coverages, safe_threshold


def drawn(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and answers that are right as often as they say."""
    dice = np.random.default_rng(seed)
    confidence = 0.34 + 0.66 * dice.beta(5.5, 0.5, rows)
    return confidence, dice.random(rows) < confidence


@pytest.mark.parametrize(("rows", "precision", "least"), [(1000, 0.9, 0.9), (3000, 0.95, 0.8)])
def test_the_precision_holds_in_random_splits(rows: int, precision: float, least: float) -> None:
    confidence, right = drawn(rows, seed=rows)
    held, shares = 0, []
    for seed in range(100):
        order = np.random.default_rng(seed).permutation(rows)
        chosen, others = order[: rows // 2], order[rows // 2 :]
        threshold = safe_threshold(precision, confidence[chosen], right[chosen])
        covered = confidence[others] >= (2 if threshold is None else threshold)
        held += not covered.any() or right[others][covered].mean() >= precision
        shares.append(covered.mean())
    assert held >= 95
    assert np.mean(shares) > least


@pytest.mark.parametrize(("rows", "precision"), [(200, 0.9), (700, 0.95)])
def test_a_precision_that_is_missed_rarely_passes(rows: int, precision: float) -> None:
    """Of answers that are right a little less often, whatever the confidence."""
    dice = np.random.default_rng(rows)
    passed = 0
    for _ in range(1000):
        right = dice.random(rows) < precision - 1e-6
        passed += safe_threshold(precision, dice.random(rows), right) is not None
    # Hardly less often than is allowed, so that no rows are left out for nothing.
    assert 25 <= passed <= 65


def test_few_rows_are_never_sure() -> None:
    # 0.95 ** 59 is the first power below one in 20.
    for rows, is_sure in ((58, False), (59, True)):
        scores = np.full(rows, 0.9)
        found = safe_threshold(0.95, scores, np.ones(rows, bool))
        assert (found == 0.9) is is_sure
    assert safe_threshold(1.0, np.full(9999, 0.9), np.ones(9999, bool)) is None


def test_equal_confidences_are_taken_together() -> None:
    confidence = np.repeat([0.9, 0.8, 0.7], 400)
    right = np.repeat([True, True, False], 400)
    (found,) = coverages([0.9], confidence.tolist(), right, groups_of(range(1200)))
    assert (found.threshold, found.covered, found.measured) == (0.8, 2 / 3, 1.0)


def test_repeated_texts_count_once() -> None:
    right = np.ones(300, bool)
    (found,) = coverages([0.95], [0.9] * 300, right, groups_of([row % 50 for row in range(300)]))
    assert (found.threshold, found.covered, found.measured) == (None, 0.0, None)
    assert coverages([0.95], None, right, groups_of(range(300))) == ()
