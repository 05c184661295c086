"""Maps from confidence to how often answers are right are those of scikit-learn, and help."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import _SigmoidCalibration
from sklearn.isotonic import IsotonicRegression

from glmbatch.evaluation.confidence.calibrate import (
    AS_IT_IS,
    ISOTONIC_TEXTS,
    LEAST_TEXTS,
    fit_isotonic,
    fit_map,
    fit_maps,
    fit_platt,
    pool,
)
from glmbatch.steps.calibration import log_odds, sigmoid


def drawn(rows: int, slope: float, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and answers that are right as often as a slope and an offset say."""
    dice = np.random.default_rng(rows)
    confidence = 0.34 + 0.66 * dice.beta(3, 0.7, rows)
    chance = sigmoid(slope * log_odds(confidence) + offset)
    return confidence, dice.random(rows) < chance


@pytest.mark.parametrize(("rows", "slope", "offset"), [(100, 0.4, 0), (999, 2.0, -1), (5000, 1, 1)])
def test_platt_scaling_is_that_of_scikit_learn(rows: int, slope: float, offset: float) -> None:
    confidence, right = drawn(rows, slope, offset)
    ours = fit_platt(confidence, right)
    theirs = _SigmoidCalibration().fit(log_odds(confidence), right)
    assert (ours.slope, ours.offset) == pytest.approx((-theirs.a_, -theirs.b_), abs=2e-4)
    expected = theirs.predict(log_odds(confidence))
    np.testing.assert_allclose(ours.chances(confidence), expected, atol=2e-4)


def test_pooled_values_are_those_of_scikit_learn() -> None:
    confidence, right = drawn(3000, 0.5)
    confidence = np.round(confidence, 3)  # equal confidences are one point
    theirs = IsotonicRegression(out_of_bounds="clip").fit(confidence, right)
    scores, values = pool(confidence, right.astype(float))
    np.testing.assert_allclose(values, theirs.predict(scores), atol=1e-12)
    # Only chances of 0 and 1 are pulled in, and lines that end there.
    anywhere = np.linspace(0, 1, 997)
    ours, expected = fit_isotonic(confidence, right).chances(anywhere), theirs.predict(anywhere)
    np.testing.assert_allclose(ours, expected, atol=1.1 / 3002)
    inside = anywhere < scores[np.searchsorted(values, 1.0) - 1]
    np.testing.assert_allclose(ours[inside], expected[inside], atol=1e-12)


@pytest.mark.parametrize("rows", [LEAST_TEXTS, 400, 3000])
def test_calibration_error_falls_on_other_rows(rows: int) -> None:
    confidence, right = drawn(2 * rows, 0.4, -0.5)  # far too sure
    fitted = fit_map(confidence[:rows], right[:rows], np.arange(rows))
    assert fitted.ece_after < 0.6 * fitted.ece_before
    assert fitted.log_loss_after < fitted.log_loss_before
    assert fitted.map.kind == "platt"  # which is the truth here
    others = fitted.map.chances(confidence[rows:])
    assert abs(others.mean() - right[rows:].mean()) < 1.5 / np.sqrt(rows)


def test_another_shape_needs_an_isotonic_map() -> None:
    confidence, _ = drawn(4000, 1)
    right = np.random.default_rng(1).random(4000) < np.where(confidence > 0.8, 0.9, 0.3)
    fitted = fit_map(confidence, right, np.arange(4000))
    assert fitted.map.kind == "isotonic"
    assert fitted.map.chances(np.array([0.5, 0.95])) == pytest.approx([0.3, 0.9], abs=0.07)
    few = slice(ISOTONIC_TEXTS - 1)
    assert fit_map(confidence[few], right[few], np.arange(4000)[few]).map.kind == "platt"


def test_repeated_texts_do_not_prove_a_map() -> None:
    # Each of 50 texts 40 times: a map that knows the texts would be perfect.
    dice = np.random.default_rng(3)
    confidence = np.repeat(dice.uniform(0.5, 1, 1000), 4)
    right = np.repeat(dice.random(1000) < 0.7, 4)
    apart = fit_map(confidence, right, np.arange(4000))
    together = fit_map(confidence, right, np.repeat(np.arange(1000), 4))
    assert apart.map.kind == "isotonic" and together.map.kind == "platt"
    assert together.texts == 1000


@pytest.mark.parametrize("right", [True, False])
def test_answers_that_are_all_alike_have_a_map(right: bool) -> None:
    confidence = np.linspace(0.5, 1.0, 200)
    fitted = fit_map(confidence, np.full(200, right), np.arange(200))
    chances = fitted.map.chances(confidence)
    assert chances == pytest.approx(np.full(200, 201 / 202 if right else 1 / 202))
    same = fit_map(np.full(200, 1.0), np.arange(200) % 4 > 0, np.arange(200))
    assert same.map.chances(np.array([0.1, 1.0])) == pytest.approx([0.75, 0.75], abs=0.01)


def test_confidence_that_is_right_stays_as_it_is() -> None:
    confidence, right = drawn(200, 1.0)
    fitted = fit_map(confidence, right, np.arange(200))
    assert fitted.map == AS_IT_IS
    assert fitted.log_loss_after == fitted.log_loss_before
    np.testing.assert_allclose(fitted.map.chances(confidence), confidence)


def test_no_map_raises_an_error() -> None:
    """Of a confidence that is nearly right, chance alone makes some maps worse."""
    without_map = 0
    for seed in range(40):
        dice = np.random.default_rng(seed)
        confidence = dice.uniform(0.3, 1, 150)
        right = dice.random(150) < confidence**1.2
        fitted = fit_map(confidence, right, np.arange(150))
        assert fitted.ece_after <= fitted.ece_before
        assert fitted.log_loss_after <= fitted.log_loss_before
        without_map += fitted.map == AS_IT_IS
    assert 0 < without_map < 40


def test_surer_answers_that_are_right_less_often_say_nothing() -> None:
    confidence, right = drawn(500, -1.0)
    found = fit_platt(confidence, right)
    assert found.slope == 0
    assert found.chances(np.array([0.2, 0.9])) == pytest.approx(right.mean(), abs=0.01)


def test_rare_labels_share_a_map() -> None:
    confidence, right = drawn(300, 1.0)
    parts = [("often", confidence, right), ("never", confidence, right & False)]
    found, few = fit_maps(parts, np.arange(300), several=True)
    assert not few and (found["often"].rows, found["never"].rows) == (300, 600)
    unknown = np.where(np.arange(300) < LEAST_TEXTS - 1, confidence, np.nan)
    found, few = fit_maps([("mood", unknown, right)], np.arange(300), several=False)
    assert (found, few) == ({}, {"mood": LEAST_TEXTS - 1})
