"""Sorted parts of the index of known answers. Numbers alone: knows no files and no answers.

An entry is the first half of a row key, as a number, and the **place** of its answer: the number of
a file in the upper 32 bits, and the row in the lower ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

FILE_SHIFT = np.uint64(32)
ROW_MASK = np.uint64((1 << 32) - 1)
# Entries that a merge holds of each segment at once: 4 MB.
MERGED_AT_ONCE = 1 << 18


class Entries(NamedTuple):
    """Entries, as two arrays of 64-bit numbers."""

    halves_K: np.ndarray
    places_K: np.ndarray


class Sorted(Protocol):
    """What a merge reads: entries in the order of their halves, which may repeat."""

    def __len__(self) -> int: ...

    def part(self, first: int, end: int) -> Entries:
        """The entries from `first` to before `end`, or to the last one."""


def places_of(files_K: np.ndarray | int, rows_K: np.ndarray) -> np.ndarray:
    """The places of rows in files with these numbers."""
    places: np.ndarray = np.asarray(files_K).astype(np.uint64) << FILE_SHIFT
    return places | rows_K.astype(np.uint64)


def files_of(places_K: np.ndarray) -> np.ndarray:
    """The number of the file in each place."""
    files: np.ndarray = (places_K >> FILE_SHIFT).astype(np.int64)
    return files


def rows_of(places_K: np.ndarray) -> np.ndarray:
    """The row in each place."""
    rows: np.ndarray = (places_K & ROW_MASK).astype(np.int64)
    return rows


class Segment:
    """Entries in memory, 16 bytes each, in the order of their halves."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries.halves_K)

    def part(self, first: int, end: int) -> Entries:
        return Entries(self._entries.halves_K[first:end], self._entries.places_K[first:end])

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The first place of each of the distinct halves `wanted` that the segment has."""
        halves_K, places_K = self._entries
        at = np.searchsorted(halves_K, wanted)
        inside = at < len(self)
        at, wanted = at[inside], wanted[inside]
        places: np.ndarray = places_K[at[halves_K[at] == wanted]]
        return places


def in_order(parts: Sequence[Entries]) -> Entries:
    """All entries, sorted by their halves; those with the same half stay in the given order."""
    halves_K = np.concatenate([part.halves_K for part in parts])
    places_K = np.concatenate([part.places_K for part in parts])
    order = np.argsort(halves_K, kind="stable")
    return Entries(halves_K[order], places_K[order])


def merged(segments: Sequence[Sorted]) -> Iterator[Entries]:
    """The entries of all segments in order, in parts, so that they need not fit in memory."""
    starts = [0] * len(segments)
    while True:
        parts = {}
        for number, segment in enumerate(segments):
            if starts[number] < len(segment):
                parts[number] = segment.part(starts[number], starts[number] + MERGED_AT_ONCE)
        if not parts:
            return
        # Up to here all parts are complete: what follows in any segment is at least as large.
        limit = min(part.halves_K[-1] for part in parts.values())
        taken = []
        for number, part in parts.items():
            end = int(np.searchsorted(part.halves_K, limit, side="right"))
            starts[number] += end
            taken.append(Entries(part.halves_K[:end], part.places_K[:end]))
        yield in_order(taken)
