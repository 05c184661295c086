"""What chance does to numbers: intervals by bootstrap, and answers swapped by lot.

An interval says how far numbers vary if other texts had been labelled. Texts are drawn, not rows:
rows with the same text are drawn together, because they say little more than one of them.
Shapes: R rows, G texts, K sums over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glmbatch.evaluation.results import Interval

DRAWS = 1000
SWAPS = 5000  # a probability of 0.05 is then known to about 0.003, one of 0.025 to about 0.002
SWAPS_AT_ONCE = 100
SEED = 20_231_117  # any number; with the same one, the same rows give the same interval
TAILS = (2.5, 97.5)  # percentiles at the ends of an interval of 95 %


@dataclass(frozen=True, slots=True)
class Compared:
    """The truth and the answer of each row to score, and the number of its text.

    `confidence` is the probability of each answer, None if there is none.
    """

    truth: Sequence[Any]
    answers: Sequence[Any]
    group_R: np.ndarray
    confidence: Sequence[float] | None = None

    def of_rows(self, rows: np.ndarray) -> Compared:
        """Only these rows."""
        confidence = self.confidence
        return Compared(
            [self.truth[row] for row in rows],
            [self.answers[row] for row in rows],
            groups_of(self.group_R[rows].tolist()),
            None if confidence is None else [confidence[row] for row in rows],
        )


Measure = Callable[[np.ndarray], Mapping[str, float]]


def groups_of(texts: Sequence[Hashable]) -> np.ndarray:
    """The number of each row's text, so that equal texts have equal numbers."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)


def intervals(measure: Measure, group_R: np.ndarray) -> dict[str, Interval]:
    """The interval of 95 % of each number that `measure` returns.

    `measure` gets the number of times that each row is drawn. A number that cannot be measured in
    every draw, or does not exist, has no interval.
    """
    found = {}
    for name, values in drawn(measure, group_R).items():
        interval = interval_of(values)
        if interval is not None:
            found[name] = interval
    return found


def interval_of(values: np.ndarray) -> Interval | None:
    """The interval that has 95 % of the drawn `values`; None if one of them does not exist."""
    if not np.isfinite(values).all():
        return None
    low, high = np.percentile(values, TAILS)
    return float(low), float(high)


def drawn(measure: Measure, group_R: np.ndarray) -> dict[str, np.ndarray]:
    """Each number that `measure` returns, in all draws of the texts."""
    dice = np.random.default_rng(SEED)
    groups = int(group_R.max()) + 1
    draws: dict[str, list[float]] = {}
    for times_G in times_drawn(groups, dice):
        for name, value in measure(times_G[group_R]).items():
            draws.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in draws.items()}


def times_drawn(groups: int, dice: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each of so many texts is in each draw of as many."""
    for _ in range(DRAWS):
        drawn_G = dice.integers(groups, size=groups)
        yield np.bincount(drawn_G, minlength=groups).astype(np.float64)


def swapped(gap_GK: np.ndarray, dice: np.random.Generator) -> Iterator[np.ndarray]:
    """What moves from one score to another if lot decides, for each text, whose answers are whose.

    `gap_GK` has the differences of the two in each text. Yields their sums over the texts that are
    swapped, SWAPS times.
    """
    for _ in range(SWAPS // SWAPS_AT_ONCE):
        is_swapped = dice.integers(2, size=(SWAPS_AT_ONCE, len(gap_GK)))
        yield from is_swapped.astype(np.float64) @ gap_GK


def whole(measure: Measure, rows: int) -> Mapping[str, float]:
    """What `measure` returns if each of so many rows is there once."""
    return measure(np.ones(rows))
