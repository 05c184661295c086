"""Whether answers are better than others to the same rows: a paired test. No model, no files.

Shapes: R rows, G texts, L labels, K sums over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from pydantic import BaseModel

from glmbatch.evaluation.bootstrap import SEED, SWAPS, TAILS, swapped, times_drawn
from glmbatch.evaluation.labels import mean_f1
from glmbatch.evaluation.results import Interval
from glmbatch.tuning.scores import has_labels, rouge_l_of_texts

DOUBT = 0.05  # differences that would come about by chance more often than this prove nothing

Answer = str | Collection[str]
Sums = np.ndarray
# A score from the K sums over rows.
Value = Callable[[Sums], float]


class Paired(BaseModel, frozen=True, extra="forbid"):
    """How much better one score is than another on the same rows.

    `interval` is of 95 %, by bootstrap over texts. `chance` is how often a difference as large
    comes about if it is decided by lot, for each text, whose answers are whose.
    """

    score: float
    other: float
    interval: Interval
    chance: float

    @property
    def difference(self) -> float:
        """Above 0 if `score` is higher."""
        return self.score - self.other

    @property
    def is_better(self) -> bool:
        """Whether the score is higher by more than chance explains."""
        return self.interval[0] > 0 and self.chance <= DOUBT


def compare_answers(
    metric: str,
    truth: Sequence[Answer],
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    group_R: np.ndarray,
) -> Paired:
    """How much better `ours` are than `theirs` by `metric`, a score of labels or of texts.

    `group_R` has the number of each row's text: rows with the same text are drawn together.
    """
    values: dict[str, Value] = {"micro_f1": _micro_f1, "macro_f1": _macro_f1}
    value = values.get(metric, _mean)
    labels: list[str] = []
    if metric in values:
        labels = sorted(set().union(*map(_set, (*truth, *ours, *theirs))))
    our_RK, their_RK = (_sums(metric, truth, answers, labels) for answers in (ours, theirs))
    groups = int(group_R.max()) + 1
    our_GK, their_GK = (_by_text(sums_RK, group_R, groups) for sums_RK in (our_RK, their_RK))
    return paired_difference(our_GK, their_GK, value)


def paired_difference(our_GK: Sums, their_GK: Sums, value: Value) -> Paired:
    """How much better our score is, from the sums of each text."""
    dice = np.random.default_rng(SEED)
    groups = len(our_GK)
    drawn = []
    for times_G in times_drawn(groups, dice):
        drawn.append(value(times_G @ our_GK) - value(times_G @ their_GK))
    low, high = np.percentile(drawn, TAILS)
    ours, theirs = our_GK.sum(axis=0), their_GK.sum(axis=0)
    score, other = value(ours), value(theirs)
    # Rounding must not make equal differences unequal.
    observed = abs(score - other) - 1e-12
    as_large = 1
    for swapped_K in swapped(our_GK - their_GK, dice):
        as_large += bool(abs(value(ours - swapped_K) - value(theirs + swapped_K)) >= observed)
    return Paired(
        score=score,
        other=other,
        interval=(float(low), float(high)),
        chance=as_large / (SWAPS + 1),
    )


def _set(answer: Answer) -> Collection[str]:
    """The labels of an answer; "" stands for none."""
    if isinstance(answer, str):
        return {answer} if answer else ()
    return answer


def _sums(
    metric: str, truth: Sequence[Answer], answers: Sequence[Answer], labels: Sequence[str]
) -> Sums:
    """What is summed over rows for `metric`: for each row its K numbers."""
    if metric in ("micro_f1", "macro_f1"):
        truth_RL, answer_RL = (has_labels([*map(_set, rows)], labels) for rows in (truth, answers))
        sums_R2L = np.stack([truth_RL & answer_RL, truth_RL.astype(float) + answer_RL], axis=1)
        return sums_R2L.sum(axis=2) if metric == "micro_f1" else sums_R2L.reshape(len(truth), -1)
    expected_R = [str(expected).strip() for expected in truth]
    answer_R = [str(answer).strip() for answer in answers]
    score_R: Sequence[float] = [a == b for a, b in zip(expected_R, answer_R, strict=True)]
    if metric == "rouge_l":
        score_R = rouge_l_of_texts(expected_R, answer_R)
    return np.stack([score_R, np.ones(len(truth))], axis=1)


def _by_text(sums_RK: Sums, group_R: np.ndarray, groups: int) -> Sums:
    sums_GK = np.zeros((groups, sums_RK.shape[1]))
    np.add.at(sums_GK, group_R, sums_RK)
    return sums_GK


def _mean(sums: Sums) -> float:
    return float(sums[0] / sums[1])


def _micro_f1(sums: Sums) -> float:
    return float(2 * sums[0] / max(sums[1], 1))


def _macro_f1(sums: Sums) -> float:
    return mean_f1(*sums.reshape(2, -1))
