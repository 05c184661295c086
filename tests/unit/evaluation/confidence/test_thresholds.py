"""Thresholds for a precision hold on rows that they were not chosen on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml

from glmbatch.evaluation.bootstrap import Compared, groups_of
from glmbatch.evaluation.confidence.thresholds import coverages, safe_threshold
from glmbatch.evaluation.labels import score_labels, score_several
from glmbatch.evaluation.render import _coverage_by_label
from glmbatch.evaluation.results import LabelResult, SeveralResult
from glmbatch.settings.job import ClassifyStep


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


def shown(result: LabelResult | SeveralResult) -> dict[str, Any]:
    """The setting in the lines of an evaluation, read as a job file is."""
    lines = list(_coverage_by_label(result))
    settings: dict[str, Any] = yaml.safe_load(lines[0].split(maxsplit=2)[2])
    return settings


def test_each_label_gets_a_threshold_to_paste() -> None:
    dice = np.random.default_rng(7)
    labels = ["yes", "no: never", "差"]
    confidence, right = drawn(6000, seed=7)
    answers = [labels[number] for number in dice.integers(0, 2, 6000)]
    answers[:20] = ["差"] * 20  # too few rows to be sure
    truth = [a if is_right else labels[2] for a, is_right in zip(answers, right, strict=True)]
    compared = Compared(truth, answers, groups_of(range(6000)), confidence.tolist())
    result = score_labels(compared, labels, [0.95])
    (setting,) = shown(result).items()
    assert setting[0] == "abstain_below" and list(setting[1]) == labels
    assert setting[1]["差"] == 0.999999
    step = ClassifyStep(name="a", labels=labels, abstain_below=setting[1])
    for label in labels[:2]:
        rows = [row for row in range(6000) if answers[row] == label]
        kept = [row for row in rows if confidence[row] >= step.least_of(label)]
        assert len(kept) > len(rows) / 2
        assert np.mean([right[row] for row in kept]) >= 0.95
    assert "no threshold is sure for ['差']" in "\n".join(_coverage_by_label(result))
    few = Compared(truth[:40], answers[:40], groups_of(range(40)), confidence.tolist()[:40])
    (line,) = _coverage_by_label(score_labels(few, labels, [0.95]))
    assert line.split(maxsplit=2)[2] == "no abstain_below is sure to hold any label to 95%"


def test_labels_judged_alone_get_a_threshold_to_paste() -> None:
    dice = np.random.default_rng(8)
    chance = dice.random((4000, 2))
    applies = dice.random((4000, 2)) < chance
    names = ("a", "b")
    truth, answers, chances = [], [], []
    for of_row, has in zip(chance, applies, strict=True):
        truth.append([name for name, is_so in zip(names, has, strict=True) if is_so])
        answers.append([name for name, one in zip(names, of_row, strict=True) if one >= 0.5])
        chances.append(dict(zip(names, of_row.tolist(), strict=True)))
    result = score_several(truth, answers, chances, groups_of(range(4000)), [0.9])
    (setting,) = shown(result).items()
    assert setting[0] == "threshold"
    step = ClassifyStep(name="a", labels=[*names], multiple=True, threshold=setting[1])
    for number, name in enumerate(names):
        kept = chance[:, number] >= step.threshold_of(name)
        assert kept.mean() >= 0.05 and applies[kept, number].mean() >= 0.9
