"""The paired test: equal to McNemar's for labels, and its scores to those of a training."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from glmbatch.evaluation.paired import compare_answers
from glmbatch.tuning.scores import score, score_selections, score_texts

LABELS = ["a", "b", "c"]


def drawn(seed: int, rows: int = 200) -> list[str]:
    return np.random.default_rng(seed).choice([*LABELS, ""], rows, p=[0.4, 0.3, 0.2, 0.1]).tolist()


@pytest.mark.parametrize(("ours", "theirs"), [(4, 0), (6, 0), (12, 3), (20, 14), (5, 5)])
def test_chance_is_that_of_mcnemars_exact_test(ours: int, theirs: int) -> None:
    truth = ["a"] * 100
    right = [("a", "b")] * ours + [("b", "a")] * theirs + [("a", "a")] * (100 - ours - theirs)
    one, other = zip(*right, strict=True)
    found = compare_answers("accuracy", truth, one, other, np.arange(100))
    exact = binomtest(ours, ours + theirs).pvalue
    assert found.chance == pytest.approx(exact, abs=0.02)
    assert found.is_better == (exact <= 0.05)
    assert found.difference == pytest.approx((ours - theirs) / 100)


def test_scores_are_those_of_a_training() -> None:
    truth = [label or "a" for label in drawn(1)]
    ours, theirs = drawn(2), truth
    expected = score(truth, ours, LABELS)
    for metric in ("accuracy", "macro_f1"):
        found = compare_answers(metric, truth, ours, theirs, np.arange(200))
        assert (found.score, found.other) == (pytest.approx(getattr(expected, metric)), 1)
        assert found.interval[1] < 0 and not found.is_better
    texts = score_texts(truth, ours)
    found = compare_answers("rouge_l", truth, ours, theirs, np.arange(200))
    assert found.score == pytest.approx(texts.rouge_l)


def test_scores_of_several_labels_are_those_of_a_training() -> None:
    truth, ours = (
        [sorted({*pair} - {""}) for pair in zip(drawn(a), drawn(b), strict=True)]
        for a, b in ((3, 4), (5, 6))
    )
    expected = score_selections(truth, ours, LABELS)
    for metric in ("micro_f1", "macro_f1"):
        found = compare_answers(metric, truth, ours, truth, np.arange(200))
        assert (found.score, found.other) == (pytest.approx(getattr(expected, metric)), 1)


def test_rows_with_one_text_count_as_one() -> None:
    truth, ours, theirs = ["a"] * 100, ["a"] * 100, ["b"] * 20 + ["a"] * 80
    alone = compare_answers("accuracy", truth, ours, theirs, np.arange(100))
    repeated = compare_answers("accuracy", truth, ours, theirs, np.maximum(np.arange(100) - 19, 0))
    assert alone.is_better and not repeated.is_better
    assert alone.difference == pytest.approx(repeated.difference)
