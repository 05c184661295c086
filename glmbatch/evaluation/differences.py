"""Two answers to each row, compared with a truth and with one another. No model, no files.

Shapes: R rows, G texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from glmbatch.evaluation.bootstrap import DRAWS, Measure, drawn, interval_of, whole
from glmbatch.evaluation.fields import (
    NULL,
    filled,
    measure_items,
    measure_values,
    same_values,
)
from glmbatch.evaluation.labels import measure_labels, measure_several
from glmbatch.evaluation.results import LabelMoves, Moved, NumberPair, PairedNumbers
from glmbatch.evaluation.texts import measure_texts
from glmbatch.tuning.scores import has_labels

Kind = Literal["labels", "several labels", "text", "value", "list"]


def pair(
    kind: Kind, truth: Sequence[Any], a: Sequence[Any], b: Sequence[Any], group_R: np.ndarray
) -> PairedNumbers:
    """The answers `a` and `b` against the truth; rows with the same number are of one text."""
    truth, a, b = (without_nulls(kind, values) for values in (truth, a, b))
    right_a, right_b = same_values(truth, a), same_values(truth, b)
    better, worse = by_text(right_b.astype(float) - right_a, group_R)
    return PairedNumbers(
        rows=len(truth),
        only_a=int((right_a & ~right_b).sum()),
        only_b=int((right_b & ~right_a).sum()),
        p=min(1.0, 2 * chance_of(max(better, worse), better + worse)),
        numbers=_numbers(_measure(kind, truth, a), _measure(kind, truth, b), group_R),
    )


def by_text(gain_R: np.ndarray, group_R: np.ndarray) -> tuple[int, int]:
    """The number of texts with a gain over their rows, and of those with a loss."""
    gain_G = np.bincount(group_R, gain_R)
    return int((gain_G > 0).sum()), int((gain_G < 0).sum())


def chance_of(heads: int, tosses: int) -> float:
    """How probable at least so many heads are in `tosses` of a fair coin."""
    log_total = math.lgamma(tosses + 1) - tosses * math.log(2)
    terms = []
    for count in range(heads, tosses + 1):
        terms.append(log_total - math.lgamma(count + 1) - math.lgamma(tosses - count + 1))
    return min(1.0, math.fsum(map(math.exp, terms)))


def without_nulls(kind: Kind, values: Sequence[Any]) -> Sequence[Any]:
    """The values with a null as what it is as good as: an empty text, or a choice of its own."""
    instead = {"text": "", "labels": NULL}
    return filled(values, instead[kind]) if kind in instead else values


def _measure(kind: Kind, truth: Sequence[Any], answers: Sequence[Any]) -> Measure:
    """The numbers of these answers by the number of times that each row is drawn."""
    if kind == "text":
        return measure_texts(truth, answers)
    if kind == "value":
        return measure_values(truth, answers)
    if kind == "list":
        return measure_items(truth, answers)
    if kind == "several labels":
        labels = sorted(set().union(*truth, *answers))
        return measure_several(has_labels(truth, labels), has_labels(answers, labels))
    labels = sorted({*truth, *answers})
    numbers = {label: number for number, label in enumerate(labels)}
    truth_R = np.array([numbers[label] for label in truth])
    answer_R = np.array([numbers[label] for label in answers])
    return measure_labels(truth_R, answer_R, None, len(labels))


def _numbers(measure_a: Measure, measure_b: Measure, group_R: np.ndarray) -> dict[str, NumberPair]:
    """Each number of both, and how sure their difference is."""

    def difference(times_R: np.ndarray) -> dict[str, float]:
        one, other = measure_a(times_R), measure_b(times_R)
        return {name: other[name] - one[name] for name in one}

    both = whole(measure_a, len(group_R)), whole(measure_b, len(group_R))
    # Both are measured in the same draws of texts, so what makes a text easy cancels out.
    draws = drawn(difference, group_R)
    numbers = {}
    for name, one in both[0].items():
        other = both[1][name]
        if math.isnan(one) or math.isnan(other):
            continue
        interval = interval_of(draws[name])
        numbers[name] = NumberPair(
            a=one,
            b=other,
            difference=other - one,
            interval=interval,
            p=None if interval is None else _chance(draws[name]),
        )
    return numbers


def _chance(values: np.ndarray) -> float:
    """How often chance alone makes a difference as large as the one that was drawn from."""
    fewer = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (DRAWS + 1))


def moved(kind: Kind, a: Sequence[Any], b: Sequence[Any]) -> Moved:
    """How many answers differ, and between which labels."""
    a, b = without_nulls(kind, a), without_nulls(kind, b)
    differ = int((~same_values(a, b)).sum())
    found = Moved(rows=len(a), differ=differ, share=differ / len(a) if len(a) else 0.0)
    if kind != "labels":
        return found
    moves: dict[str, Counter[str]] = {}
    for one, other in zip(a, b, strict=True):
        if one != other:
            moves.setdefault(one, Counter())[other] += 1
    return found.model_copy(update={"labels": _label_moves(a, b, moves), "moves": moves})


def _label_moves(
    a: Sequence[str], b: Sequence[str], moves: Mapping[str, Counter[str]]
) -> dict[str, LabelMoves]:
    rows_a, rows_b = Counter(a), Counter(b)
    labels = {}
    for label, _ in (rows_a + rows_b).most_common():
        left = moves[label].total() if label in moves else 0
        labels[label] = LabelMoves(
            a=rows_a[label], b=rows_b[label], moved=left / rows_a[label] if rows_a[label] else 0.0
        )
    return labels
