"""Scores compared with scikit-learn and with values computed by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support

from glmbatch.tuning.scores import fit_temperature, score, score_texts


def test_scores_equal_those_of_scikit_learn() -> None:
    dice = random.Random(3)
    labels = ["a", "b", "c", "never"]
    truth = [dice.choice("abc") for _ in range(300)]
    guess = [true if dice.random() < 0.6 else dice.choice("abc") for true in truth]
    found = score(truth, guess, labels, [0.5] * 300)
    precision, recall, f1, rows = precision_recall_fscore_support(
        truth, guess, labels=labels, zero_division=0
    )
    for at, label in enumerate(labels):
        one = found.labels[label]
        assert (one.precision, one.recall, one.f1, one.rows) == pytest.approx(
            (precision[at], recall[at], f1[at], rows[at])
        )
    assert found.macro_f1 == pytest.approx(f1_score(truth, guess, average="macro"))
    assert found.ece == pytest.approx(abs(found.accuracy - 0.5))


def test_rows_without_an_answer_are_wrong() -> None:
    found = score(["a", "b"], ["a", ""], ["a", "b"])
    assert (found.accuracy, found.confusion["b"][""], found.ece) == (0.5, 1, None)


def test_calibration_is_measured_in_bins() -> None:
    found = score(["a"] * 10, ["a"] * 5 + ["b"] * 5, ["a", "b"], [0.95] * 5 + [0.55] * 5)
    assert found.bins == ((5, pytest.approx(0.55), 0.0), (5, pytest.approx(0.95), 1.0))
    assert found.ece == pytest.approx(0.5 * 0.55 + 0.5 * 0.05)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_of_sampled_labels_is_recovered(temperature: float) -> None:
    dice = np.random.default_rng(0)
    logits = dice.normal(size=(20_000, 3)) * 3
    chances = np.exp(logits / temperature)
    chances /= chances.sum(axis=1, keepdims=True)
    truth = np.array([dice.choice(3, p=row) for row in chances])
    found = fit_temperature(logits, truth)
    assert found == pytest.approx(temperature, rel=0.05)
    assert log_loss(truth, _softmax(logits / found)) <= log_loss(truth, _softmax(logits)) + 1e-9


def _softmax(logits: np.ndarray) -> np.ndarray:
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(chances / chances.sum(axis=1, keepdims=True))


def test_rouge_l_is_the_f1_of_the_common_subsequence() -> None:
    found = score_texts(["abcd", "same ", "", "x"], ["axcy", "same", "", ""])
    assert found.exact_match == 0.5
    assert found.rouge_l == pytest.approx((2 * 2 / 8 + 1 + 1 + 0) / 4)
