"""Orders for a person who reads a few of many rows: unlike ones first, and some drawn by lot.

Knows no files and no steps.

Letters in names of arrays: N texts, B buckets of n-grams.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import count
from typing import TypeVar

import numpy as np

Item = TypeVar("Item", bound=Hashable)

# One row in ten is drawn by lot: those of which the model is sure are looked at too.
LOT = 10
# A row steps back if its likeness to another is above 1 less a fifth. Rows that are less alike
# teach different things, and those of which the model is least sure teach most.
NEW = 5
# Characters that are compared together, in any script.
GRAM = 4
BUCKETS = 512
NUMBER = re.compile(r"\d+([.,]\d+)*")
# An odd number with bits everywhere, so that neighbouring characters fall into different buckets.
MIX = np.uint64(0x9E3779B97F4A7C15)


def spread(
    texts: Sequence[str], worths: Sequence[float], known: Sequence[str] = ()
) -> Iterator[int]:
    """The places of `texts`, each time that of the greatest worth times newness.

    Newness is 0 if a text before it or in `known` has the same n-grams, and 1 if all are unlike it.
    Of equals the earlier one comes first. `worths` are at least 0.
    """
    sketches_NB = _sketches(texts)
    newness_N = np.ones(len(texts), np.float32)
    for sketch_B in _sketches(known):
        newness_N = np.minimum(newness_N, NEW * (1 - sketches_NB @ sketch_B))
    worth_N = np.asarray(worths, np.float32)
    is_left_N = np.ones(len(texts), bool)
    for _ in texts:
        value_N = np.where(is_left_N, worth_N * newness_N.clip(0, 1), -1)
        place = int(value_N.argmax())
        is_left_N[place] = False
        yield place
        newness_N = np.minimum(newness_N, NEW * (1 - sketches_NB @ sketches_NB[place]))


def with_lot(best: Iterable[Item], drawn: Iterable[Item]) -> Iterator[Item]:
    """`best` in order, and in every tenth place one of `drawn`; none twice."""
    shown: set[Item] = set()
    rest = [iter(best), iter(drawn)]
    for number in count(1):
        by_lot = number % LOT == 0
        for turn in (by_lot, not by_lot):
            item = next((item for item in rest[turn] if item not in shown), None)
            if item is not None:
                shown.add(item)
                yield item
                break
        else:
            return


def _sketches(texts: Sequence[str]) -> np.ndarray:
    """For each text a vector of length 1 whose products with others say how alike they are.

    All numbers are alike: they are what differs between copies of a template.
    """
    sketches_NB = np.zeros((len(texts), BUCKETS), np.float32)
    for place, text in enumerate(texts):
        plain = NUMBER.sub("0", text.lower())
        characters = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32)
        grams = np.zeros(max(1, len(characters) - GRAM + 1), np.uint64)
        for start in range(min(GRAM, len(characters))):
            grams = (grams + characters[start : start + len(grams)]) * MIX
        grams = np.unique(grams) >> np.uint64(32)
        # Half of the n-grams count as -1, so that those that share a bucket cancel out on average.
        signs = (grams >> np.uint64(16) & np.uint64(1)).astype(np.float32) * 2 - 1
        buckets = (grams % np.uint64(BUCKETS)).astype(np.int64)
        sketch_B = np.bincount(buckets, signs, BUCKETS)
        sketches_NB[place] = sketch_B / max(float(np.linalg.norm(sketch_B)), 1e-9)
    return sketches_NB
