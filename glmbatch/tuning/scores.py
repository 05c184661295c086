"""Computes scores from predictions and probabilities. No model, no files.

Shapes: R rows, L labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from pydantic import BaseModel

BINS = 10  # few, because more would be nearly empty with a few hundred rows
# The temperature is between 1/20 and 20; beyond, probabilities are all equal or all certain.
HIGHEST_TEMPERATURE = 20
# Each step of golden-section search keeps this share of the interval; 60 steps give 12 digits.
GOLDEN = 0.618034
SEARCH_STEPS = 60
WORD = re.compile("[a-z0-9]+")


class LabelScore(BaseModel, frozen=True, extra="forbid"):
    """Precision, recall and F1 of one label, from 0 to 1; `rows` is how many rows truly have it."""

    precision: float
    recall: float
    f1: float
    rows: int


class Scores(BaseModel, frozen=True, extra="forbid"):
    """Scores of a classifier, from 0 to 1.

    `macro_f1` is the mean over the labels that occur in the truth or the predictions.
    `confusion[true][predicted]` counts rows; a row without an answer has the prediction "". `ece`
    is the expected calibration error over ten bins of the highest probability (Guo et al., 2017).
    `bins` has the rows, mean probability and accuracy of each bin. Without probabilities, `ece` is
    None and `bins` is empty.
    """

    rows: int
    accuracy: float
    macro_f1: float
    labels: Mapping[str, LabelScore]
    confusion: Mapping[str, Mapping[str, int]]
    ece: float | None = None
    bins: tuple[tuple[int, float, float], ...] = ()


class SelectionScores(BaseModel, frozen=True, extra="forbid"):
    """Scores of a classifier that gives a row several labels or none, from 0 to 1.

    `micro_f1` is the F1 of all labels of all rows together, `macro_f1` the mean over the labels
    that occur in the truth or the predictions. `all_right` is the share of rows with all of their
    labels and no other. `ece` and `bins` are as in `Scores`, over the probability that each label
    applies to each row.
    """

    rows: int
    micro_f1: float
    macro_f1: float
    all_right: float
    labels: Mapping[str, LabelScore]
    ece: float | None = None
    bins: tuple[tuple[int, float, float], ...] = ()


class TextScores(BaseModel, frozen=True, extra="forbid"):
    """Scores of generated answers: the share of exact matches and the mean ROUGE-L (Lin, 2004).

    ROUGE-L is the F1 of the longest common subsequence, here of characters, so that no language
    needs a tokenizer. Both are from 0 to 1.
    """

    rows: int
    exact_match: float
    rouge_l: float


def score_texts(truth: Sequence[str], answers: Sequence[str]) -> TextScores:
    """Scores of `answers` against `truth`, row by row; white space at both ends is ignored."""
    truth = [text.strip() for text in truth]
    answers = [text.strip() for text in answers]
    exact = sum(one == other for one, other in zip(truth, answers, strict=True))
    return TextScores(
        rows=len(truth),
        exact_match=exact / len(truth),
        rouge_l=math.fsum(rouge_l_of_texts(truth, answers)) / len(truth),
    )


def rouge_l(expected: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two texts or lists of words, from 0 to 1.

    As rouge-score computes it, to the last bit; 0 if one of them is empty, or both.
    """
    from rapidfuzz.distance import LCSseq

    common = LCSseq.similarity(expected, answer)
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def rouge_l_of_texts(truth: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-L over characters, row by row, so that no language needs a tokenizer.

    Unlike in rouge-score, an empty answer where none is expected is right.
    """
    pairs = zip(truth, answers, strict=True)
    return [rouge_l(one, other) if one or other else 1.0 for one, other in pairs]


def words_of(text: str) -> list[str]:
    """The words of a text as rouge-score takes them: runs of a-z and 0-9, in lower case."""
    return WORD.findall(text.lower())


def score(
    truth: Sequence[str],
    predicted: Sequence[str],
    labels: Sequence[str],
    confidence: Sequence[float] | None = None,
) -> Scores:
    """Scores of `predicted` against `truth`; `confidence` is the probability of each prediction."""
    # A row without an answer is wrong, but no label's false positive, so it has its own column.
    confusion = {label: dict.fromkeys([*labels, ""], 0) for label in labels}
    for label, guess in zip(truth, predicted, strict=True):
        confusion[label][guess] += 1
    by_label = {label: _label_score(label, confusion) for label in labels}
    used = [
        by_label[label].f1
        for label in sorted(labels)
        if by_label[label].rows or _guesses(label, confusion)
    ]
    right = sum(confusion[label][label] for label in labels)
    bins: list[tuple[int, float, float]] = []
    error = None
    if confidence is not None:
        is_right = [label == guess for label, guess in zip(truth, predicted, strict=True)]
        bins = bins_of(np.array(is_right), np.asarray(confidence))
        error = calibration_error(bins)
    return Scores(
        rows=len(truth),
        accuracy=right / len(truth),
        macro_f1=float(np.mean(used)),  # in scikit-learn's order, for the same last digit
        labels=by_label,
        confusion=confusion,
        ece=error,
        bins=tuple(bins),
    )


def score_selections(
    truth: Sequence[Collection[str]],
    predicted: Sequence[Collection[str]],
    labels: Sequence[str],
    probabilities: Sequence[Mapping[str, float]] | None = None,
) -> SelectionScores:
    """Scores of the `predicted` labels of each row against its true ones.

    `probabilities` has that of each label, for each row; a label without one has 0.
    """
    probability_RL = None
    if probabilities is not None:
        probability_RL = np.zeros((len(truth), len(labels)))
        for place, label in enumerate(labels):
            probability_RL[:, place] = [row.get(label, 0.0) for row in probabilities]
    truth_RL, guess_RL = has_labels(truth, labels), has_labels(predicted, labels)
    return score_arrays(truth_RL, guess_RL, labels, probability_RL)


def has_labels(rows: Sequence[Collection[str]], labels: Sequence[str]) -> np.ndarray:
    """Whether each of `rows` has each of `labels`."""
    has_RL = np.zeros((len(rows), len(labels)), bool)
    for place, label in enumerate(labels):
        has_RL[:, place] = [label in row for row in rows]
    return has_RL


def score_arrays(
    truth_RL: np.ndarray,
    guess_RL: np.ndarray,
    labels: Sequence[str] | None = None,
    probability_RL: np.ndarray | None = None,
) -> SelectionScores:
    """As `score_selections`, from whether each row has each label; without names, by number."""
    names = labels or [str(number) for number in range(truth_RL.shape[1])]
    right_L = (truth_RL & guess_RL).sum(axis=0)
    counts = zip(names, right_L, truth_RL.sum(axis=0), guess_RL.sum(axis=0), strict=True)
    by_label, used = {}, []
    for name, right, rows, guesses in counts:
        by_label[name] = _rates(int(right), int(rows), int(guesses))
        if rows or guesses:
            used.append(by_label[name].f1)
    bins: list[tuple[int, float, float]] = []
    error = None
    if probability_RL is not None:
        bins = bins_of(truth_RL.ravel(), probability_RL.ravel())
        error = calibration_error(bins)
    whole = _rates(int(right_L.sum()), int(truth_RL.sum()), int(guess_RL.sum()))
    return SelectionScores(
        rows=len(truth_RL),
        micro_f1=whole.f1,
        macro_f1=math.fsum(used) / max(1, len(used)),
        all_right=float((truth_RL == guess_RL).all(axis=1).mean()),
        labels=by_label,
        ece=error,
        bins=tuple(bins),
    )


def _guesses(label: str, confusion: Mapping[str, Mapping[str, int]]) -> int:
    """Number of rows with the prediction `label`."""
    return sum(row[label] for row in confusion.values())


def _label_score(label: str, confusion: Mapping[str, Mapping[str, int]]) -> LabelScore:
    right = confusion[label][label]
    rows = sum(confusion[label].values())
    return _rates(right, rows, _guesses(label, confusion))


def _rates(right: int, rows: int, guesses: int) -> LabelScore:
    """The scores of a label that `rows` rows have, and that was given `guesses` times."""
    return LabelScore(
        precision=right / max(1, guesses),
        recall=right / max(1, rows),
        f1=2 * right / max(1, guesses + rows),
        rows=rows,
    )


def bin_of(confidence_R: np.ndarray) -> np.ndarray:
    """The number of the bin of each confidence; 1 belongs to the last bin."""
    bin_R: np.ndarray = np.minimum((confidence_R * BINS).astype(int), BINS - 1)
    return bin_R


def bins_of(right_R: np.ndarray, confidence_R: np.ndarray) -> list[tuple[int, float, float]]:
    """Rows, mean confidence and accuracy of each bin that has rows."""
    bin_R = bin_of(confidence_R)
    bins = []
    for number in range(BINS):
        inside_R = bin_R == number
        if inside_R.any():
            mean = float(confidence_R[inside_R].mean())
            bins.append((int(inside_R.sum()), mean, float(right_R[inside_R].mean())))
    return bins


def calibration_error(bins: Sequence[tuple[int, float, float]]) -> float:
    """The mean distance of probability and accuracy over the rows of `bins`."""
    gaps = [rows * abs(probability - accuracy) for rows, probability, accuracy in bins]
    return math.fsum(gaps) / sum(rows for rows, _, _ in bins)


def fit_temperature(logits_RL: np.ndarray, truth: np.ndarray) -> float:
    """The divisor of the logits that makes the true labels most likely.

    `truth` has the number of each row's label, or 1 and 0 for each label of each row. Temperature
    scaling never changes which label is likeliest (Guo et al., 2017), nor whether one is likelier
    than not. The loss is convex in the inverse temperature, so a search over its logarithm finds
    the only minimum.
    """
    logits_RL = logits_RL.astype(np.float64)
    if truth.ndim == 1:
        # The highest logit of a row becomes 0, so that no exponential overflows.
        logits_RL -= logits_RL.max(axis=1, keepdims=True)
    rows = np.arange(len(truth))

    def loss(log_inverse: float) -> float:
        scaled_RL = logits_RL * math.exp(log_inverse)
        if truth.ndim > 1:
            return float((np.logaddexp(0, scaled_RL) - truth * scaled_RL).mean())
        return float((np.log(np.exp(scaled_RL).sum(axis=1)) - scaled_RL[rows, truth]).mean())

    high = math.log(HIGHEST_TEMPERATURE)
    low = -high
    for _ in range(SEARCH_STEPS):
        left = high - GOLDEN * (high - low)
        right = low + GOLDEN * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp(-(low + high) / 2)


def same_for_all(scores: Scores | SelectionScores, metric: str) -> str | list[str]:
    """The answer that scores best if every row gets the same: a label, or several.

    `scores` are any of the rows, for the number of rows of each label.
    """
    labels = sorted(scores.labels, key=lambda label: -scores.labels[label].rows)
    if isinstance(scores, Scores):
        return labels[0]
    # Which rows have a label does not matter to answers that are the same for all.
    rows = np.arange(scores.rows)[:, None]
    truth_RL = rows < np.array([scores.labels[label].rows for label in labels])
    best: tuple[list[str], float] = ([], 0.0)
    for count in range(1, len(labels) + 1):  # the most frequent ones, whatever their number
        guess_RL = np.broadcast_to(np.arange(len(labels)) < count, truth_RL.shape)
        measured = getattr(score_arrays(truth_RL, guess_RL), metric)
        if measured > best[1]:
            best = (labels[:count], measured)
    return best[0]
