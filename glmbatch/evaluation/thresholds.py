"""How many rows reach a precision: those whose confidence is above a threshold.

Shapes: R rows, N rows above the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from glmbatch.evaluation.results import Coverage

# A threshold is looked for among so many, from few rows to all. More would find a better one, but
# each further one may pass by chance, and the bound allows for that.
LEVELS = 20
DOUBT = 0.05  # how often at most a threshold is given whose precision is too low


def coverages(
    precisions: Sequence[float],
    confidence: Sequence[float] | None,
    right_R: np.ndarray,
    group_R: np.ndarray,
) -> tuple[Coverage, ...]:
    """The coverage at each of `precisions`; empty if the answers have no `confidence`."""
    if confidence is None:
        return ()
    # Of equal texts the first: a bound needs rows that do not repeat one another.
    rows = np.unique(group_R, return_index=True)[1]
    confidence_R = np.asarray(confidence, np.float64)
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

    None if no threshold is sure enough. The bound is that of Clopper and Pearson (1934), one-sided,
    for all thresholds at once (Bonferroni): in at most one of 20 sets of rows, the precision of the
    threshold is lower on rows that are drawn like these.
    """
    order = np.argsort(-confidence_R, kind="stable")
    scores = confidence_R[order]
    wrong = np.cumsum(~right_R[order])
    # A threshold takes all rows of one confidence or none.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    for level in range(LEVELS, 0, -1):
        rows = math.ceil(len(order) * level / LEVELS)
        last = int(ends[np.searchsorted(ends, rows - 1)])
        if _is_sure(precision, last + 1, int(wrong[last])):
            return float(scores[last])
    return None


def _is_sure(precision: float, rows: int, wrong: int) -> bool:
    """Whether so few of `rows` being wrong would be unlikely if `precision` were not reached."""
    if precision >= 1:
        return False  # no number of rows shows that none will ever be wrong
    errors_N = np.arange(wrong + 1)
    logs = np.cumsum(np.log(np.arange(1, rows + 1)))
    factorials = np.concatenate([[0.0], logs])
    log_chances_N = factorials[rows] - factorials[errors_N] - factorials[rows - errors_N]
    log_chances_N += errors_N * math.log(1 - precision) + (rows - errors_N) * math.log(precision)
    return float(np.exp(log_chances_N).sum()) <= DOUBT / LEVELS
