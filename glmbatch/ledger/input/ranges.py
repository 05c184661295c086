"""Cut the rows of a file into ranges, each of which becomes a fragment. Opens no file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from glmbatch.ledger.fragments import Fragment, packed


class Range(NamedTuple):
    """The place of a fragment in its file: fields of `Fragment`."""

    first_row: int
    rows: int
    row_groups: tuple[int, ...]
    skip_rows: int
    span: int = 0
    picked: str = ""


def ranges(
    group_rows: Sequence[int], rows_per_fragment: int, kept: Sequence[np.ndarray] | None
) -> Iterator[Range]:
    """The ranges of a file, of which only the `kept` rows of each row group count; None for all."""
    if kept is None or sum(map(len, kept)) == sum(group_rows):
        for first_row, rows, groups, skip_rows in cut(group_rows, rows_per_fragment):
            yield Range(first_row, rows, groups, skip_rows)
        return
    for first_row, span, groups, numbers in cut_kept(kept, group_rows, rows_per_fragment):
        picked = packed(numbers - first_row, span) if len(numbers) else ""
        yield Range(first_row, len(numbers), groups, 0, span, picked)


def cut(
    group_rows: Sequence[int], rows_per_fragment: int
) -> Iterator[tuple[int, int, tuple[int, ...], int]]:
    """Cut row groups of the given sizes into ranges, in order.

    A range is (first row, rows, row groups, rows to skip in the first group).

    Whole row groups are joined up to `rows_per_fragment`, so that none is read twice. Only a row
    group that is larger is cut. A file without rows gives one empty range, so that it has a file in
    the output.
    """
    first_row = 0
    pending: list[int] = []
    pending_rows = 0
    for group, size in enumerate(group_rows):
        if pending and pending_rows + size > rows_per_fragment:
            yield first_row, pending_rows, tuple(pending), 0
            first_row += pending_rows
            pending = []
            pending_rows = 0
        if size > rows_per_fragment:
            for skip in range(0, size, rows_per_fragment):
                yield first_row + skip, min(rows_per_fragment, size - skip), (group,), skip
            first_row += size
        elif size:
            pending.append(group)
            pending_rows += size
    if pending or not first_row:
        yield first_row, pending_rows, tuple(pending), 0


def cut_kept(
    kept: Sequence[np.ndarray], group_rows: Sequence[int], most: int
) -> Iterator[tuple[int, int, tuple[int, ...], np.ndarray]]:
    """Cut the kept rows of a file into ranges of at most `most`, in order.

    A range is (first row, rows of the file that it covers, row groups with kept rows, numbers of
    the kept rows in the file). The ranges cover the file; one without kept rows has one range.
    """
    starts = np.concatenate([[0], np.cumsum(group_rows)])
    parts: list[tuple[list[int], list[np.ndarray]]] = []
    room = 0
    for group, rows in enumerate(kept):
        numbers = rows + starts[group]
        for begin in range(0, len(numbers), most):
            part = numbers[begin : begin + most]
            if len(part) > room:
                parts.append(([], []))
                room = most
            parts[-1][0].append(group)
            parts[-1][1].append(part)
            room -= len(part)
        if len(numbers) > most:  # a large group shares no range, so that none is read twice
            room = 0
    parts = parts or [([], [np.empty(0, np.int64)])]
    firsts = [0, *(int(numbers[0][0]) for _, numbers in parts[1:]), int(starts[-1])]
    for place, (groups, numbers) in enumerate(parts):
        covered = firsts[place + 1] - firsts[place]
        yield firsts[place], covered, tuple(groups), np.concatenate(numbers)


def limited(ranges: Sequence[Fragment], limit: int | None) -> Iterator[Fragment]:
    """The first fragments, of `limit` rows together, the last one cut short; all without one."""
    missing = sum(fragment.rows for fragment in ranges) if limit is None else limit
    for fragment in ranges:
        if limit is not None and not missing:
            return
        yield (
            fragment if fragment.rows <= missing else fragment.model_copy(update={"rows": missing})
        )
        missing -= min(missing, fragment.rows)
