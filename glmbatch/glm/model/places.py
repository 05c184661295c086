"""Which places of the arena are free. No tensors.

A sequence takes consecutive places, the first gap that is long enough, and gives them back.
"""

from __future__ import annotations

import bisect


class Places:
    """The places of an arena, `total` of them, all free at first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._gaps = [(0, total)]  # free ranges (start, end) in order, never adjacent

    def take(self, length: int) -> int | None:
        """Take `length` consecutive places; returns the first, or None if no gap is so long."""
        for at, (start, end) in enumerate(self._gaps):
            if end - start >= length:
                self._shorten(at, length)
                return start
        return None

    def extend(self, end: int, more: int) -> bool:
        """Take the `more` places from `end` on, if they are free."""
        at = bisect.bisect_left(self._gaps, (end,))
        if at == len(self._gaps) or self._gaps[at][0] != end or self._gaps[at][1] - end < more:
            return False
        self._shorten(at, more)
        return True

    def give_back(self, start: int, length: int) -> None:
        """Free `length` places from `start` on."""
        end = start + length
        at = bisect.bisect_left(self._gaps, (start,))
        if at < len(self._gaps) and self._gaps[at][0] == end:
            end = self._gaps.pop(at)[1]
        if at and self._gaps[at - 1][1] == start:
            start = self._gaps.pop(at - 1)[0]
            at -= 1
        self._gaps.insert(at, (start, end))

    def _shorten(self, at: int, length: int) -> None:
        start, end = self._gaps[at]
        if start + length == end:
            del self._gaps[at]
        else:
            self._gaps[at] = (start + length, end)
