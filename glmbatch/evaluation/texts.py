"""Scores of written texts: exact matches, ROUGE-L and chrF. No model, no files.

Shapes: R rows, C characters of all texts, N three counts for each length of n-grams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from glmbatch.evaluation.bootstrap import Measure, intervals, whole
from glmbatch.evaluation.results import TextResult
from glmbatch.tuning.scores import rouge_l, rouge_l_of_texts, words_of

# Those of Popović (2015), and of sacrebleu.
ORDERS = 6
BETA = 2


def score_written(truth: Sequence[str], answers: Sequence[str], group_R: np.ndarray) -> TextResult:
    """Scores of `answers` against `truth`, row by row; white space at both ends is ignored."""
    measure = measure_texts(truth, answers)
    numbers = whole(measure, len(truth))
    found = {name: None if math.isnan(value) else value for name, value in numbers.items()}
    return TextResult(rows=len(truth), intervals=intervals(measure, group_R), **found)


def measure_texts(truth: Sequence[str], answers: Sequence[str]) -> Measure:
    """The numbers of texts by the number of times that each row is drawn."""
    truth = [text.strip() for text in truth]
    answers = [text.strip() for text in answers]
    exact_R = np.array([a == b for a, b in zip(truth, answers, strict=True)], np.float64)
    rouge_R = np.array(rouge_l_of_texts(truth, answers))
    word_truth = [words_of(text) for text in truth]
    word_answers = [words_of(text) for text in answers]
    words_R = np.array([rouge_l(a, b) for a, b in zip(word_truth, word_answers, strict=True)])
    has_words_R = np.array([bool(words) for words in word_truth], np.float64)
    counts_RN = _ngram_counts(truth, answers)

    def measure(times_R: np.ndarray) -> dict[str, float]:
        rows = times_R.sum()
        with_words = float(times_R @ has_words_R)
        return {
            "exact_match": float(times_R @ exact_R / rows),
            "rouge_l": float(times_R @ rouge_R / rows),
            "rouge_l_words": float(times_R @ words_R) / with_words if with_words else math.nan,
            "chrf": _chrf(times_R @ counts_RN),
        }

    return measure


def _chrf(counts_N: np.ndarray) -> float:
    """The F-score of character n-grams, from 0 to 100: their mean precision and mean recall.

    `counts_N` has for each order the n-grams of the answers, of the truth, and those in both. As
    in sacrebleu, orders for which no text is long enough do not count.
    """
    precision = recall = 0.0
    orders = 0
    for answered, expected, common in counts_N.reshape(ORDERS, 3).tolist():
        if answered > 0 and expected > 0:
            precision += common / answered
            recall += common / expected
            orders += 1
    if precision + recall == 0:
        return 0.0
    precision /= orders
    recall /= orders
    factor = BETA**2
    return 100 * ((1 + factor) * precision * recall / (factor * precision + recall))


def _ngram_counts(truth: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """The counts that `_chrf` takes, for each row. White space is not counted."""
    rows = len(truth)
    texts = ["".join(text.split()) for text in (*answers, *truth)]
    lengths = np.array([len(text) for text in texts])
    # Every character as a number, and the text that it is in.
    joined = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    alphabet, letter_C = np.unique(joined, return_inverse=True)
    owner_C = np.repeat(np.arange(2 * rows), lengths)
    # n-grams as numbers: equal texts of n characters have equal ones.
    gram_C = letter_C
    counts = np.zeros((rows, ORDERS, 3))
    for order in range(1, ORDERS + 1):
        if order > 1:
            pairs_C = gram_C[:-1] * len(alphabet) + letter_C[order - 1 :]
            gram_C = np.unique(pairs_C, return_inverse=True)[1]
        first_C = owner_C[: len(gram_C)]
        inside_C = first_C == owner_C[order - 1 :]  # not across the end of a text
        counts[:, order - 1] = _common(gram_C[inside_C], first_C[inside_C], rows)
        # As in sacrebleu: if the truth has no n-gram that long, those of the answer do not count.
        counts[:, order - 1, 0] *= lengths[rows:] >= order
    return counts.reshape(rows, 3 * ORDERS)


def _common(gram_C: np.ndarray, owner_C: np.ndarray, rows: int) -> np.ndarray:
    """For each row the n-grams of the answer, those of the truth, and those in both."""
    most = int(gram_C.max(initial=0)) + 1
    is_answer_C = owner_C < rows
    row_C = owner_C % rows
    keys = row_C * most + gram_C
    answered, answered_times = np.unique(keys[is_answer_C], return_counts=True)
    expected, expected_times = np.unique(keys[~is_answer_C], return_counts=True)
    both, in_answer, in_truth = np.intersect1d(
        answered, expected, assume_unique=True, return_indices=True
    )
    common = np.minimum(answered_times[in_answer], expected_times[in_truth])
    totals = [
        np.bincount(row_C[is_answer_C], minlength=rows),
        np.bincount(row_C[~is_answer_C], minlength=rows),
        np.bincount(both // most, common, minlength=rows),
    ]
    return np.stack(totals, axis=1)
