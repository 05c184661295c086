"""How good predictions are: counts and probabilities in, scores out. No model, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel

BINS = 10


class LabelScore(BaseModel, frozen=True, extra="forbid"):
    """Precision, recall and F1 of one label, over `rows` that truly have it."""

    precision: float
    recall: float
    f1: float
    rows: int


class Scores(BaseModel, frozen=True, extra="forbid"):
    """Scores over held-out rows; macro-F1 is over labels that rows have or were given.

    `confusion[true][predicted]` counts rows; "" is predicted where a row has no answer. `ece`: expected calibration
    error over ten bins of the highest probability (Guo et al., 2017); `bins` are (rows, mean probability, accuracy) of
    each. Both empty for predictions without probabilities.
    """

    rows: int
    accuracy: float
    macro_f1: float
    labels: Mapping[str, LabelScore]
    confusion: Mapping[str, Mapping[str, int]]
    ece: float | None = None
    bins: tuple[tuple[int, float, float], ...] = ()


class TextScores(BaseModel, frozen=True, extra="forbid"):
    """Scores of written answers beside those expected: the share that is equal, and the mean ROUGE-L (Lin, 2004).

    ROUGE-L is the F1 of the longest common subsequence, here of characters, which no language needs a tokenizer for.
    """

    rows: int
    exact_match: float
    rouge_l: float


def score_texts(truth: Sequence[str], written: Sequence[str]) -> TextScores:
    """Scores of `written` beside `truth`, blanks at both ends left out."""
    pairs = [(one.strip(), other.strip()) for one, other in zip(truth, written, strict=True)]
    return TextScores(
        rows=len(pairs),
        exact_match=sum(one == other for one, other in pairs) / len(pairs),
        rouge_l=math.fsum(_rouge_l(one, other) for one, other in pairs) / len(pairs),
    )


def _rouge_l(one: str, other: str) -> float:
    if not one or not other:
        return float(one == other)
    before = [0] * (len(other) + 1)
    for character in one:
        now = [0]
        for at, each in enumerate(other):
            now.append(before[at] + 1 if each == character else max(before[at + 1], now[at]))
        before = now
    return 2 * before[-1] / (len(one) + len(other))


def score(
    truth: Sequence[str],
    predicted: Sequence[str],
    labels: Sequence[str],
    confidence: Sequence[float] | None = None,
) -> Scores:
    """Scores of `predicted` beside `truth`; `confidence` is the probability of each prediction."""
    confusion = {label: dict.fromkeys([*labels, ""], 0) for label in labels}
    for true, guess in zip(truth, predicted, strict=True):
        confusion[true][guess] += 1
    each = {label: _label_score(label, confusion) for label in labels}
    seen = [
        label
        for label in labels
        if each[label].rows or any(row[label] for row in confusion.values())
    ]
    right = sum(confusion[label][label] for label in labels)
    bins = (
        []
        if confidence is None
        else _bins([t == p for t, p in zip(truth, predicted, strict=True)], confidence)
    )
    return Scores(
        rows=len(truth),
        accuracy=right / len(truth),
        macro_f1=math.fsum(each[label].f1 for label in seen) / len(seen),
        labels=each,
        confusion=confusion,
        ece=None
        if confidence is None
        else math.fsum(n * abs(p - a) for n, p, a in bins) / len(truth),
        bins=tuple(bins),
    )


def _label_score(label: str, confusion: Mapping[str, Mapping[str, int]]) -> LabelScore:
    right, true = confusion[label][label], sum(confusion[label].values())
    guessed = sum(row[label] for row in confusion.values())
    return LabelScore(
        precision=right / guessed if guessed else 0.0,
        recall=right / true if true else 0.0,
        f1=2 * right / (guessed + true) if guessed + true else 0.0,
        rows=true,
    )


def _bins(right: Sequence[bool], confidence: Sequence[float]) -> list[tuple[int, float, float]]:
    place = np.minimum((np.asarray(confidence) * BINS).astype(int), BINS - 1)
    found = []
    for at in range(BINS):
        here = place == at
        if here.any():
            found.append(
                (
                    int(here.sum()),
                    float(np.asarray(confidence)[here].mean()),
                    float(np.asarray(right)[here].mean()),
                )
            )
    return found


def fit_temperature(logits_RL: np.ndarray, truth_R: np.ndarray) -> float:
    """The number to divide logits by that makes the truth likeliest; between 1/20 and 20.

    One number cannot change which label is the likeliest (Guo et al., 2017). The loss is convex in its inverse.
    """
    logits_RL = logits_RL.astype(np.float64) - logits_RL.max(axis=1, keepdims=True)
    rows = np.arange(len(truth_R))

    def loss(inverse: float) -> float:
        scaled = logits_RL * inverse
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[rows, truth_R]).mean())

    low, high = math.log(1 / 20), math.log(20)
    for _ in range(60):  # golden-section search
        one, other = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
        low, high = (low, other) if loss(math.exp(one)) < loss(math.exp(other)) else (one, high)
    return math.exp(-(low + high) / 2)
