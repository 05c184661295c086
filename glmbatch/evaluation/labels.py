"""Scores of labels, one for each row or several, with their intervals. No model, no files.

Shapes: R rows, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from glmbatch.evaluation.bootstrap import Compared, Measure, intervals, whole
from glmbatch.evaluation.confidence.thresholds import coverages
from glmbatch.evaluation.results import LabelResult, SeveralResult
from glmbatch.tuning.scores import (
    BINS,
    bin_of,
    bins_of,
    calibration_error,
    has_labels,
    score,
    score_arrays,
)


def score_labels(
    compared: Compared, labels: Sequence[str], precisions: Sequence[float] = ()
) -> LabelResult:
    """Scores of one label for each row, and the rows covered at each of `precisions`.

    `labels` are those that may be answered. Truths beside them are counted and always wrong.
    """
    truth, answers, confidence = compared.truth, compared.answers, compared.confidence
    everything = [*labels, *sorted({*truth, *answers} - {*labels})]
    scores = score(truth, answers, everything, confidence)
    confidence_R = None if confidence is None else np.asarray(confidence, np.float64)
    numbers = {label: number for number, label in enumerate(everything)}
    truth_R = np.array([numbers[label] for label in truth])
    answer_R = np.array([numbers[label] for label in answers])
    measure = measure_labels(truth_R, answer_R, confidence_R, len(everything))
    by_label = {}
    if precisions and confidence_R is not None:
        for label in labels:
            rows = np.flatnonzero(answer_R == numbers[label])
            right_R = truth_R[rows] == answer_R[rows]
            groups = compared.group_R[rows]
            by_label[label] = coverages(precisions, confidence_R[rows], right_R, groups)
    return LabelResult(
        **scores.model_dump(),
        coverage=coverages(precisions, confidence, truth_R == answer_R, compared.group_R),
        by_label=by_label,
        unknown_truths=Counter(label for label in truth if label not in labels),
        intervals=intervals(measure, compared.group_R),
    )


def measure_labels(
    truth_R: np.ndarray, answer_R: np.ndarray, confidence_R: np.ndarray | None, labels: int
) -> Measure:
    """Accuracy, macro-F1 and calibration error by the number of times that each row is drawn."""
    right_R = truth_R == answer_R
    bin_R = None if confidence_R is None else bin_of(confidence_R)

    def measure(times_R: np.ndarray) -> dict[str, float]:
        right_L = np.bincount(truth_R, times_R * right_R, labels)
        rows_L = np.bincount(truth_R, times_R, labels) + np.bincount(answer_R, times_R, labels)
        rows = times_R.sum()
        found = {"accuracy": float(right_L.sum() / rows), "macro_f1": mean_f1(right_L, rows_L)}
        if confidence_R is not None and bin_R is not None:
            gap_N = np.bincount(bin_R, times_R * (confidence_R - right_R), BINS)
            found["ece"] = float(np.abs(gap_N).sum() / rows)
        return found

    return measure


def mean_f1(right_L: np.ndarray, rows_L: np.ndarray) -> float:
    """Mean F1 of the labels that occur; 0 if none does.

    `rows_L` counts both their truths and their answers.
    """
    occurs_L = rows_L > 0
    if not occurs_L.any():
        return 0.0
    return float((2 * right_L[occurs_L] / rows_L[occurs_L]).mean())


def score_several(
    truth: Sequence[Collection[str]],
    answers: Sequence[Collection[str]],
    chances: Sequence[Mapping[str, float]],
    group_R: np.ndarray,
    precisions: Sequence[float] = (),
) -> SeveralResult:
    """Scores of lists of labels; `chances` has the probability of each label of the step.

    Also the rows that each label covers at each of `precisions`.
    """
    labels = list(chances[0])
    unknown = Counter[str]()
    for row in truth:
        unknown.update({*row} - {*labels})
    everything = [*labels, *sorted(unknown)]
    truth_RL = has_labels(truth, everything)
    answer_RL = has_labels(answers, everything)
    measure = measure_several(truth_RL, answer_RL)
    chance_RL = np.array([list(row.values()) for row in chances])
    bins = bins_of(truth_RL[:, : len(labels)].ravel(), chance_RL.ravel())
    by_label = {}
    for number, label in enumerate(labels if precisions else []):
        chance_R, right_R = chance_RL[:, number], truth_RL[:, number].astype(bool)
        by_label[label] = coverages(precisions, chance_R, right_R, group_R)
    return SeveralResult(
        rows=len(truth),
        **whole(measure, len(truth)),
        labels=score_arrays(truth_RL, answer_RL, everything).labels,
        ece=calibration_error(bins),
        bins=tuple(bins),
        by_label=by_label,
        unknown_truths=unknown,
        intervals=intervals(measure, group_R),
    )


def measure_several(truth_RL: np.ndarray, answer_RL: np.ndarray) -> Measure:
    """The numbers of several labels for a row by the number of times that each row is drawn.

    The arrays say whether each row has each label.
    """
    exact_R = (truth_RL == answer_RL).all(axis=1)
    # As numbers once, and not in each draw.
    right_RL = (truth_RL & answer_RL).astype(np.float64)
    truth_RL, answer_RL = truth_RL.astype(np.float64), answer_RL.astype(np.float64)

    def measure(times_R: np.ndarray) -> dict[str, float]:
        right_L, truths_L, answers_L = times_R @ right_RL, times_R @ truth_RL, times_R @ answer_RL
        right, truths, answers = right_L.sum(), truths_L.sum(), answers_L.sum()
        return {
            "exact_match": float(times_R @ exact_R / times_R.sum()),
            "micro_precision": float(right / max(answers, 1)),
            "micro_recall": float(right / max(truths, 1)),
            "micro_f1": float(2 * right / max(truths + answers, 1)),
            "macro_f1": mean_f1(right_L, truths_L + answers_L),
        }

    return measure
