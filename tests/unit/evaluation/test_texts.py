"""Scores of texts, compared with those of rouge-score and sacrebleu."""

from __future__ import annotations

import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from glmbatch.evaluation.bootstrap import groups_of
from glmbatch.evaluation.texts import score_written

WORDS = ["good", "Very", "it's", "100%", "很好", "不", "naïve", "👍🏽", "so\nso", "x"]


class Characters:
    """A tokenizer of rouge-score that gives each character."""

    def tokenize(self, text: str) -> list[str]:
        return list(text)


def texts(rows: int, seed: int, least: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randrange(least, 14))) for _ in range(rows)]


def test_rouge_l_is_that_of_rouge_score() -> None:
    truth, answers = texts(200, 1, least=1), texts(200, 2)
    found = score_written(truth, answers, groups_of(truth))
    by_character = RougeScorer(["rougeL"], tokenizer=Characters())
    expected = [
        by_character.score(one, other)["rougeL"].fmeasure
        for one, other in zip(truth, answers, strict=True)
    ]
    assert found.rouge_l == pytest.approx(np.mean(expected), abs=1e-15)
    by_word = RougeScorer(["rougeL"])
    english = [(one, other) for one, other in zip(truth, answers, strict=True) if _has_word(one)]
    assert len(english) < len(truth)
    expected = [by_word.score(one, other)["rougeL"].fmeasure for one, other in english]
    assert found.rouge_l_words == pytest.approx(np.mean(expected), abs=1e-15)


def _has_word(text: str) -> bool:
    return any(letter.isascii() and letter.isalnum() for letter in text)


@pytest.mark.parametrize("seed", range(5))
def test_chrf_is_that_of_sacrebleu(seed: int) -> None:
    # A few short texts, so that some n-grams are longer than any of them.
    rows = [1, 2, 3, 50, 200][seed]
    truth, answers = texts(rows, seed, least=1), texts(rows, seed + 10)
    found = score_written(truth, answers, groups_of(truth))
    assert found.chrf == CHRF().corpus_score(answers, [truth]).score
    low, high = found.intervals["chrf"]
    assert low <= found.chrf <= high


def test_texts_without_characters_are_compared() -> None:
    found = score_written(["", "a", ""], ["", "", "b"], groups_of(range(3)))
    assert (found.exact_match, found.rouge_l, found.chrf) == (1 / 3, 1 / 3, 0.0)
    assert found.rouge_l_words == 0.0
    nothing = score_written(["", "好"], ["", "好"], groups_of(range(2)))
    assert nothing.rouge_l_words is None and "rouge_l_words" not in nothing.intervals
