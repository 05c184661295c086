"""Scores of labels, compared with scikit-learn's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from sklearn.preprocessing import MultiLabelBinarizer

from glmbatch.evaluation.bootstrap import Compared, groups_of, intervals
from glmbatch.evaluation.labels import score_labels, score_several

LABELS = ["good", "bad", "so so", "never"]


def drawn(rows: int, seed: int = 0) -> Compared:
    """Answers of which six in ten are right, and some truths that are no label."""
    dice = random.Random(seed)
    truth = [dice.choice([*LABELS[:3], "other"]) for _ in range(rows)]
    answers = [true if dice.random() < 0.6 else dice.choice(LABELS[:3]) for true in truth]
    answers = [answer if answer in LABELS else "bad" for answer in answers]
    texts = [dice.randrange(rows // 2) for _ in range(rows)]
    return Compared(truth, answers, groups_of(texts), [dice.random() for _ in range(rows)])


def test_scores_of_labels_are_those_of_scikit_learn() -> None:
    compared = drawn(400)
    found = score_labels(compared, LABELS)
    truth, answers = compared.truth, compared.answers
    assert found.accuracy == accuracy_score(truth, answers)
    assert found.macro_f1 == f1_score(truth, answers, average="macro")
    for label in ("good", "other"):
        one = found.labels[label]
        scores = [
            measure(truth, answers, labels=[label], average=None, zero_division=0)[0]
            for measure in (precision_score, recall_score, f1_score)
        ]
        assert [one.precision, one.recall, one.f1] == scores
    assert found.unknown_truths == {"other": compared.truth.count("other")}
    assert found.confusion["other"]["other"] == 0


def test_scores_of_several_labels_are_those_of_scikit_learn() -> None:
    dice = random.Random(1)
    labels = ["a", "b", "c", "d"]
    truth = [dice.sample(labels, dice.randrange(4)) for _ in range(300)]
    answers = [[label for label in row if dice.random() < 0.7] for row in truth]
    answers = [[*row, *({"d"} - {*row})] if dice.random() < 0.3 else row for row in answers]
    chances = [{label: dice.random() for label in labels} for _ in truth]
    found = score_several(truth, answers, chances, groups_of(range(300)))
    binarizer = MultiLabelBinarizer(classes=labels)
    one, other = binarizer.fit_transform(truth), binarizer.transform(answers)
    assert found.exact_match == accuracy_score(one, other)
    assert found.micro_precision == precision_score(one, other, average="micro")
    assert found.micro_recall == recall_score(one, other, average="micro")
    assert found.micro_f1 == f1_score(one, other, average="micro")
    assert found.macro_f1 == f1_score(one, other, average="macro")
    assert [found.labels[label].f1 for label in labels] == [*f1_score(one, other, average=None)]
    # Independent of the truth, these probabilities are 0.5 on average and mean nothing.
    applies = one.mean()
    assert found.ece == pytest.approx(
        np.mean([abs(c - applies) for _, c, _ in found.bins]), abs=0.1
    )


def test_intervals_hold_for_other_draws_of_rows() -> None:
    # The true accuracy is known, so count how often an interval has it.
    hits = 0
    for seed in range(40):
        dice = np.random.default_rng(seed)
        right = dice.random(200) < 0.8

        def measure(times: np.ndarray, right: np.ndarray = right) -> dict[str, float]:
            return {"accuracy": float(times @ right / times.sum())}

        low, high = intervals(measure, groups_of(range(200)))["accuracy"]
        hits += low <= 0.8 <= high
    assert 35 <= hits <= 40


def test_repeated_texts_are_drawn_together() -> None:
    compared = drawn(300)
    twice = Compared([*compared.truth] * 3, [*compared.answers] * 3, np.tile(compared.group_R, 3))
    once = score_labels(Compared(compared.truth, compared.answers, compared.group_R), LABELS)
    assert score_labels(twice, LABELS).intervals["accuracy"] == once.intervals["accuracy"]
    alone = Compared(twice.truth, twice.answers, groups_of(range(900)))
    low, high = score_labels(alone, LABELS).intervals["accuracy"]
    wide_low, wide_high = once.intervals["accuracy"]
    assert high - low < 0.7 * (wide_high - wide_low)
