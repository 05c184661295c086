"""How many rows reach a precision: those whose confidence is above a threshold.

Shapes: R rows, N numbers of wrong answers, L thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from glmbatch.evaluation.results import Coverage

# A threshold is looked for among so many, from few rows to all. More would find a better one, but
# each further one may pass by chance, and the bound allows for that.
LEVELS = 20
DOUBT = 0.05  # how often at most a threshold is given whose precision is too low
HALVINGS = 12  # of the doubt of each level, which is then known to a thousandth
NEGLIGIBLE = 1e-18


def coverages(
    precisions: Sequence[float],
    confidence: Sequence[float] | np.ndarray | None,
    right_R: np.ndarray,
    group_R: np.ndarray,
) -> tuple[Coverage, ...]:
    """The coverage at each of `precisions`; empty if the answers have no `confidence`."""
    if confidence is None:
        return ()
    # Of equal texts the first: a bound needs rows that do not repeat one another.
    rows = np.unique(group_R, return_index=True)[1]
    confidence_R = np.asarray(confidence, np.float64)
    if not len(rows):
        return tuple(
            Coverage(precision=precision, threshold=None, covered=0.0, measured=None)
            for precision in precisions
        )
    found = []
    for precision in precisions:
        threshold = safe_threshold(precision, confidence_R[rows], right_R[rows])
        covered_R = confidence_R >= (math.inf if threshold is None else threshold)
        found.append(
            Coverage(
                precision=precision,
                threshold=threshold,
                covered=float(covered_R.mean()),
                measured=float(right_R[covered_R].mean()) if covered_R.any() else None,
            )
        )
    return tuple(found)


def safe_threshold(precision: float, confidence_R: np.ndarray, right_R: np.ndarray) -> float | None:
    """The least threshold above which answers to other rows are right in the share `precision`.

    None if no threshold is sure enough: in at most one of 20 sets of rows, the precision of the
    threshold is lower on rows that are drawn like these.
    """
    if precision >= 1:
        return None  # no number of rows shows that none will ever be wrong
    order = np.argsort(-confidence_R, kind="stable")
    scores = confidence_R[order]
    wrong = np.cumsum(~right_R[order])
    # A threshold takes all rows of one confidence or none.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    rows_L = np.ceil(len(order) * np.arange(1, LEVELS + 1) / LEVELS).astype(int)
    lasts = np.unique(ends[np.searchsorted(ends, rows_L - 1)])
    most_L = most_wrong(precision, tuple((lasts + 1).tolist()))
    for last, most in zip(lasts[::-1], most_L[::-1], strict=True):
        if wrong[last] <= most:
            return float(scores[last])
    return None


@lru_cache(64)  # fields of one step have as many rows
def most_wrong(precision: float, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How many of the first `sizes` rows may be wrong to show the precision; -1 if none shows it.

    Each size passes by chance as rarely as every other (Pocock, 1977), and any of them in at most
    one set of rows of 20. That chance is exact for answers that have just the precision above every
    threshold. Where it is lower above some of them, these pass less often, and the others no more.
    """
    # The logarithms of the factorials.
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, sizes[-1] + 1)))])

    def allowed(doubt: float) -> tuple[int, ...]:
        return tuple(_allowed(precision, rows, doubt, logs) for rows in sizes)

    if _any_passes(precision, sizes, allowed(DOUBT), logs) <= DOUBT:
        return allowed(DOUBT)
    low, high = DOUBT / LEVELS, DOUBT
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        if _any_passes(precision, sizes, allowed(middle), logs) <= DOUBT:
            low = middle
        else:
            high = middle
    return allowed(low)


def _allowed(precision: float, rows: int, doubt: float, logs: np.ndarray) -> int:
    """The most wrong answers among `rows` that are unlikely if the precision is not reached."""
    most = min(rows, math.ceil(rows * (1 - precision)))
    chances_N = np.cumsum(_chances(precision, rows, most, logs))
    return int((chances_N <= doubt).sum()) - 1


def _any_passes(
    precision: float, sizes: Sequence[int], allowed: Sequence[int], logs: np.ndarray
) -> float:
    """How often any size passes, if answers are right in just the share `precision`."""
    most = max(allowed)
    if most < 0:
        return 0.0
    passed = 0.0
    # The chance of each number of wrong answers so far, without having passed.
    chances_N = np.ones(1)
    before = 0
    for rows, limit in zip(sizes, allowed, strict=True):
        new_N = _chances(precision, rows - before, min(most, rows - before), logs)
        # Far from the mean, they are nothing but work.
        new_N = np.trim_zeros(np.where(new_N < NEGLIGIBLE, 0.0, new_N), "b")
        chances_N = np.convolve(chances_N, new_N)[: most + 1]
        passed += float(chances_N[: limit + 1].sum())
        chances_N[: limit + 1] = 0.0
        before = rows
    return passed


def _chances(precision: float, rows: int, most: int, logs: np.ndarray) -> np.ndarray:
    """The chance of each number of wrong answers among `rows`, from none to `most`."""
    wrong_N = np.arange(most + 1)
    log_chances_N = logs[rows] - logs[wrong_N] - logs[rows - wrong_N]
    log_chances_N += wrong_N * math.log(1 - precision) + (rows - wrong_N) * math.log(precision)
    chances_N: np.ndarray = np.exp(log_chances_N)
    return chances_N
