"""Which files of a table cannot have a row that meets a condition, by what the table says of them.

A table may know the least and greatest value of a column in each file, and how many nulls there
are. They are compared for all files at once, and no file is opened.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError
from glmbatch.settings.conditions import Compares, Condition, IsNull, IsOneOf, Test
from glmbatch.store.inputs.conditions import Possible, joined, outcomes_of

# Kinds of values whose order is that of their bounds.
_ORDERED = (
    pa.types.is_integer,
    pa.types.is_float32,
    pa.types.is_float64,
    pa.types.is_string,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_decimal,
)


@dataclass(frozen=True, slots=True)
class ColumnBounds:
    """Of each file of a table, the least and greatest value of a column, and the number of nulls.

    Null where the table does not say it.
    """

    least: pa.Array
    greatest: pa.Array
    nulls: pa.Array

    def take(self, places: pa.Array) -> ColumnBounds:
        """The bounds of some files, by their places."""
        return ColumnBounds(
            *(part.take(places) for part in (self.least, self.greatest, self.nulls))
        )


def without_rows(
    conditions: Mapping[str, Condition | bool], bounds: Mapping[str, ColumnBounds]
) -> set[str]:
    """The files that have no row that meets their condition.

    `conditions` has every file of the table by name, in the order of the `bounds` of each column.
    """
    alike: dict[Condition, list[int]] = defaultdict(list)
    names = list(conditions)
    for place, condition in enumerate(conditions.values()):
        if not isinstance(condition, bool):
            alike[condition].append(place)
    gone: set[str] = set()
    for condition, places in alike.items():
        chosen = pa.array(places, pa.int64())
        some = {name: column.take(chosen) for name, column in bounds.items()}
        for place, may_hold in zip(places, _may_hold(condition, some, len(places)), strict=True):
            if not may_hold:
                gone.add(names[place])
    return gone


def _may_hold(condition: Condition, bounds: Mapping[str, ColumnBounds], files: int) -> list[bool]:
    """Whether a row of each of as many files as `files` may meet the condition."""
    may_hold: list[bool] = joined(
        condition, lambda test: _possible(test, bounds, files)
    ).yes.to_pylist()
    return may_hold


def _possible(test: Test, bounds: Mapping[str, ColumnBounds], files: int) -> Possible:
    """Whether a row of each file may meet a test, may miss it, and may have a null."""
    all_may = pa.repeat(pa.scalar(value=True), files)
    if test.column not in bounds:
        return Possible(all_may, all_may, all_may)
    column = bounds[test.column]
    kind = column.least.type
    has_null = all_may  # NaN counts as null, and no bound tells of it
    if not pa.types.is_floating(kind):
        has_null = pc.greater(column.nulls, 0).fill_null(fill_value=True)
    if isinstance(test, IsNull):
        return Possible(has_null, all_may, pc.invert(all_may))
    if not any(is_kind(kind) for is_kind in _ORDERED):
        return Possible(all_may, all_may, has_null)
    try:
        yes, no = within(test, column.least, column.greatest)
    except InputError:
        return Possible(all_may, all_may, all_may)
    fill = {"fill_value": True}
    return Possible(yes.fill_null(**fill), no.fill_null(**fill), has_null)


def within(test: Test, least: pa.Array, greatest: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Whether a value within each pair of bounds may meet a test, and may miss it."""
    all_may = pa.repeat(pa.scalar(value=True), len(least))
    if isinstance(test, Compares) and test.sign not in ("==", "!="):
        # One of the bounds comes nearest to meeting it, and the other to missing it.
        at_least, at_greatest = outcomes_of(test, least), outcomes_of(test, greatest)
        return pc.or_(at_least, at_greatest), pc.invert(pc.and_(at_least, at_greatest))
    if not isinstance(test, Compares | IsOneOf):
        return all_may, all_may
    inside = pc.invert(all_may)
    for value in (test.value,) if isinstance(test, Compares) else test.values:
        above = outcomes_of(Compares(test.column, "<=", value), least)
        below = outcomes_of(Compares(test.column, ">=", value), greatest)
        inside = pc.or_(inside, pc.and_(above, below))
    if isinstance(test, Compares) and test.sign == "!=":
        return all_may, inside
    return inside, all_may
