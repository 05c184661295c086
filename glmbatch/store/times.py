"""Choose the unit for INT96 times, a deprecated Parquet type without a unit of its own.

Microseconds cover every year, nanoseconds keep every digit; no Parquet type does both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from glmbatch.errors import UnusableFile
from glmbatch.store.parquet import TimeUnit, open_parquet, read_rows
from glmbatch.store.paths import Address
from glmbatch.store.types import has_int96, inner_arrays

ALL_ROWS = 1 << 62  # in place of a number of rows
MAX_MICROSECONDS = (2**63 - 1) // 1000  # before and after 1970, the range of nanoseconds


@dataclass(frozen=True, slots=True)
class Times:
    """The range and precision of INT96 times in some rows of a file, and the `columns` with them.

    `finer`: some have digits below a microsecond. `far`: some are outside the range of nanoseconds.
    """

    columns: tuple[str, ...] = ()
    finer: bool = False
    far: bool = False

    def joined(self, other: Times) -> Times:
        """These times together with those of other rows of the same file."""
        return Times(self.columns, self.finer or other.finer, self.far or other.far)

    def misfit(self, unit: TimeUnit) -> str | None:
        """Why `unit` cannot hold these times; None if it can."""
        end = "no type holds both. Write them as another type."
        if self.finer and self.far:
            return (
                f"its INT96 times {list(self.columns)} are finer than microseconds, and some are "
                f"outside the years 1677 to 2262; {end}"
            )
        if self.finer and unit == "us":
            return (
                f"its INT96 times {list(self.columns)} are finer than microseconds, in which this "
                f"output has those of other files; {end}"
            )
        if self.far and unit == "ns":
            return (
                f"its INT96 times {list(self.columns)} are outside the years 1677 to 2262, but "
                f"this output has those of other files in nanoseconds; {end}"
            )
        return None


def look_at_times(path: Address, row_groups: Sequence[int], skip_rows: int, rows: int) -> Times:
    """The INT96 times in these rows, which it reads twice, once in each unit.

    Rows are given as to `read_rows`, ALL_ROWS for those of the row groups. UnusableFile when they
    cannot be read.
    """
    names = int96_columns(path)
    if rows == ALL_ROWS:
        with open_parquet(path) as file:
            rows = sum(file.metadata.row_group(group).num_rows for group in row_groups)
    coarse = read_rows(path, row_groups, skip_rows, rows, names)
    fine = read_rows(path, row_groups, skip_rows, rows, names, int96="ns")
    finer = far = False
    for one, other in zip(coarse, fine, strict=True):
        for column, finer_column in zip(one.columns, other.columns, strict=True):
            digits, reaches = _digits(column, finer_column)
            finer |= digits
            far |= not reaches
    return Times(tuple(names), finer, far)


def int96_columns(path: Address) -> list[str]:
    """The names of the columns that contain INT96 times, at any depth."""
    with open_parquet(path) as file:
        if not has_int96(file):
            return []
        plain = file.schema_arrow
    with open_parquet(path, "ns") as file:
        changed = zip(plain, file.schema_arrow, strict=True)
        return [field.name for field, other in changed if field.type != other.type]


def int96_unit(path: Address, row_groups: Sequence[int], skip_rows: int, rows: int) -> TimeUnit:
    """The unit that holds every INT96 time of these rows: microseconds, unless one is finer.

    Rows are given as to `read_rows`. UnusableFile when neither unit holds them all.
    """
    times = look_at_times(path, row_groups, skip_rows, rows)
    unit: TimeUnit = "ns" if times.finer else "us"
    if problem := times.misfit(unit):
        raise UnusableFile(f"{path}: {problem}")
    return unit


def with_common_columns(times: Mapping[str, Times]) -> list[dict[str, Times]]:
    """The times by source, in groups: sources that share a column are in the same group."""
    groups: list[tuple[set[str], dict[str, Times]]] = []
    for source, its_times in times.items():
        columns = set(its_times.columns)
        joined: dict[str, Times] = {}
        others = []
        for group in groups:
            if columns.isdisjoint(group[0]):
                others.append(group)
                continue
            columns |= group[0]
            group[1].update(joined)
            joined = group[1]
        joined[source] = its_times
        groups = [*others, (columns, joined)]
    return [group[1] for group in groups]


def one_unit(
    times: Collection[Times], kept: Iterable[Address], published: Iterable[Address]
) -> TimeUnit:
    """The unit for all of `times`: microseconds, unless some are finer and none is far.

    The unit of `kept` files of the output decides first, because they are not rewritten. If neither
    unit holds all times, the unit of any `published` file decides: sources that do not fit it are
    left out, and their published files stay.
    """
    columns = set().union(*(its_times.columns for its_times in times))
    finer = any(its_times.finer for its_times in times)
    far = any(its_times.far for its_times in times)
    unit = _unit_written(kept, columns)
    if unit is not None or not finer:
        return unit or "us"
    return (_unit_written(published, columns) or "us") if far else "ns"


def _unit_written(paths: Iterable[Address], columns: Collection[str]) -> TimeUnit | None:
    """The unit of times in `columns` in the first file that has some; None if none has."""
    for path in paths:
        with suppress(UnusableFile), open_parquet(path) as file:
            for field in file.schema_arrow:
                if field.name in columns and "timestamp[" in str(field.type):
                    return "ns" if "timestamp[ns" in str(field.type) else "us"
    return None


def _digits(coarse: pa.Array, fine: pa.Array) -> tuple[bool, bool]:
    """Whether any time is finer than a microsecond, and whether nanoseconds hold all.

    `coarse` and `fine` are the same times, read as microseconds and as nanoseconds.
    """
    if not pa.types.is_timestamp(coarse.type):
        parts = zip(inner_arrays(coarse), inner_arrays(fine), strict=True)
        pairs = [_digits(*part) for part in parts]
        return any(pair[0] for pair in pairs), all(pair[1] for pair in pairs)
    micros = coarse.drop_null().cast(pa.int64()).to_numpy()
    nanos = fine.drop_null().cast(pa.int64()).to_numpy()
    # Both wrap around in the same way, so the difference is exact even outside the range.
    finer = bool(np.any(nanos - micros * 1000))
    return finer, bool(np.all(np.abs(micros) < MAX_MICROSECONDS))
