"""Which rows `data.where` keeps: by the names of folders, by footers, and only then by values.

A file in the folder `day=1` is tested by that name, before it is opened. What is left of the
condition is tested by the least and greatest values that a footer has of each row group. Rows are
read only of the others, and of them only the columns in the condition.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glmbatch.errors import InputError, UnusableFile, counted, shown
from glmbatch.settings.conditions import (
    Both,
    Condition,
    Either,
    IsNull,
    Not,
    Test,
    columns_of,
    parse_condition,
    text_of,
)
from glmbatch.store.inputs.conditions import (
    Possible,
    check_tests,
    joined,
    outcomes_of,
    where_holds,
)
from glmbatch.store.inputs.found import Found
from glmbatch.store.inputs.needs import folder_columns, in_file
from glmbatch.store.lines.form import LINE_ERROR, is_lines
from glmbatch.store.parquet import check_column, read_opened
from glmbatch.store.tables.bounds import within, without_rows
from glmbatch.store.tables.fitting import columns_in_file, fitted_fields, fitted_rows
from glmbatch.store.types import leaves

SETTING = "data.where"
# Kinds of values whose order in a footer is that of the values.
_ORDERED = (
    pa.types.is_integer,
    pa.types.is_float32,
    pa.types.is_float64,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_decimal,
)


@dataclass(frozen=True, slots=True)
class RowFilter:
    """The condition of a job on its rows; None keeps all. `text` in it means `text_column`.

    `unsaid` is as in `Found`: values in the names of folders that say nothing.
    """

    condition: Condition | None
    text_column: str
    unsaid: Mapping[str, Mapping[str, str | None]]
    _by_folder: dict[tuple[str, frozenset[str]], Condition | bool] = field(
        default_factory=dict, compare=False
    )

    def left_of(self, name: str) -> Condition | bool:
        """What the folders of the file `name` leave of the condition.

        True if it holds for all rows, and False if for none. InputError for a test that a value in
        the name does not allow.
        """
        if self.condition is None:
            return True
        folder = name.rpartition("/")[0]
        unsaid = frozenset(self.unsaid.get(name, ()))
        if (folder, unsaid) not in self._by_folder:
            values = folder_columns(name, unsaid)
            try:
                left = _left(self.condition, values, self.text_column, positive=True)
            except InputError as error:
                raise InputError(f"{shown(folder)}: {error}. Set {SETTING}.") from error
            self._by_folder[folder, unsaid] = left
        left = self._by_folder[folder, unsaid]
        if isinstance(left, bool) or not is_lines(name):
            return left
        # A line that cannot be read has no values, and must not be left out for that.
        return Either(left, Not(IsNull(LINE_ERROR)))

    def text_for(self, name: str) -> str:
        """The condition on the rows of the file `name`, as text; empty if all of them are kept."""
        left = self.left_of(name)
        return "" if isinstance(left, bool) else text_of(left)


def row_filter(
    where: str | None, text_column: str, unsaid: Mapping[str, Mapping[str, str | None]]
) -> RowFilter:
    """The filter that `data.where` says; `unsaid` is as in `Found`."""
    return RowFilter(None if where is None else parse_condition(where), text_column, unsaid)


def in_folders(
    found: Found, keeps: RowFilter, address: str, where: str | None
) -> tuple[Found, list[str]]:
    """The files that are not left out by the names of their folders, and those that are.

    Those of a table may be left out by its bounds too. InputError when all of the files at
    `address` are, which names the condition `where`.
    """
    gone = left_out(found, keeps)
    if not gone:
        return found, []
    refused = {name: why for name, why in found.refused.items() if keeps.left_of(name) is not False}
    if len(gone) == len(found.names) and not refused:
        why = "and no folder's name meets"
        if found.bounds:
            why = "and no value that the table records meets"
        raise InputError(
            f"{shown(address)}: {counted(len(gone), 'file')}, {why} {SETTING}: {where}. "
            f"Set {SETTING}."
        )
    names = [name for name in found.names if name not in gone]
    stamps = {name: stamp for name, stamp in found.stamps.items() if name not in gone}
    return replace(found, names=names, stamps=stamps, refused=refused, bounds={}), sorted(gone)


def left_out(found: Found, keeps: RowFilter) -> set[str]:
    """The files that are known to have no row that is kept, without a look at them."""
    conditions = {name: keeps.left_of(name) for name in found.names}
    gone = {name for name, condition in conditions.items() if condition is False}
    return gone | without_rows(conditions, found.bounds) if found.bounds else gone


def _left(
    condition: Condition, values: Mapping[str, str | None], text_column: str, *, positive: bool
) -> Condition | bool:
    """What is left of `condition` where `values` are known.

    A test of a null counts as missed or, within a `not`, as met: the row is left out either way.
    """
    if isinstance(condition, Not):
        part = _left(condition.part, values, text_column, positive=not positive)
        return not part if isinstance(part, bool) else Not(part)
    if isinstance(condition, Both | Either):
        first = _left(condition.first, values, text_column, positive=positive)
        second = _left(condition.second, values, text_column, positive=positive)
        decides = isinstance(condition, Either)
        for one, other in ((first, second), (second, first)):
            if isinstance(one, bool):
                return one if one is decides else other
        assert not isinstance(first, bool)
        assert not isinstance(second, bool)
        return type(condition)(first, second)
    if condition.column not in values:
        column = text_column if condition.column == "text" else condition.column
        return replace(condition, column=column)
    value = pa.array([values[condition.column]], pa.string())
    outcome = outcomes_of(condition, value)[0].as_py()
    return not positive if outcome is None else bool(outcome)


def check_filter(
    where: str, name: str, condition: Condition, schema: pa.Schema, folders: Collection[str]
) -> None:
    """UnusableFile unless a file with this schema has the columns of `condition`, of fit types.

    It need not have those of the `folders` above the file `name`.
    """
    given = tuple(column for column in folders if column not in schema.names)
    columns = [column for column in columns_of(condition) if column not in given]
    try:
        for column in columns:
            own, setting = in_file(name, schema, column, SETTING)
            check_column(where, own, column, setting, text=False, plain=False, folders=given)
        kinds = {column: schema.field(column).type for column in columns}
        check_tests(condition, kinds, (where, SETTING))
    except InputError as error:
        raise UnusableFile(str(error)) from error


def kept_rows(
    file: pq.ParquetFile, condition: Condition, where: str, fitted: str = ""
) -> Iterator[np.ndarray]:
    """For each row group of an open file, the numbers of the rows that are kept, from 0 in it.

    The file's footer was checked (see `check_chunks`). `fitted` is as in `Fragment`.
    """
    columns = columns_of(condition)
    read = columns_in_file(columns, fitted)
    places = _places(file, columns, fitted)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        if not group.num_rows or not _may_hold(condition, group, places):
            yield np.empty(0, np.int64)
            continue
        rows = (number,), 0, group.num_rows
        holds = []
        for batch in read_opened(file, *rows, columns=read, where=where, checked=True):
            row_holds = holding(condition, fitted_rows(batch, fitted, columns))
            holds.append(row_holds.to_numpy(zero_copy_only=False))
        yield np.flatnonzero(np.concatenate(holds))


def _places(
    file: pq.ParquetFile, columns: Sequence[str], fitted: str
) -> dict[str, tuple[int, pa.DataType]]:
    """The places in `file` of those of `columns` that it has and that are not nested.

    With each is the type that its values get.
    """
    at = {leaf.path: place for place, leaf in enumerate(leaves(file))}
    kinds = {field.name: field.type for field in fitted_fields(file.schema_arrow, fitted)}
    places = {}
    for column in columns:
        for name in columns_in_file([column], fitted):
            if name in at:
                places[column] = at[name], kinds[column]
    return places


def holding(condition: Condition, rows: pa.RecordBatch) -> pa.Array:
    """For each row whether `condition` holds: true or false, never null."""
    columns = {name: pa.chunked_array([rows[name]]) for name in columns_of(condition)}
    return where_holds(condition, columns)


def _may_hold(
    condition: Condition,
    group: pq.RowGroupMetaData,
    places: Mapping[str, tuple[int, pa.DataType]],
) -> bool:
    """Whether a row of the group may be kept, by what the footer says of its columns."""

    def possible(test: Test) -> Possible:
        yes, no, null = True, True, True
        if test.column in places:
            place, kind = places[test.column]
            counts = group.column(place).statistics
            if counts is not None:
                yes, no, null = _by_counts(test, counts, kind)
        return Possible(*(pa.array([one]) for one in (yes, no, null)))

    return bool(joined(condition, possible).yes[0].as_py())


def _by_counts(test: Test, counts: pq.Statistics, kind: pa.DataType) -> tuple[bool, bool, bool]:
    """Whether a test may be met, may be missed, and may meet a null; NaN counts as null."""
    floats = pa.types.is_floating(kind)
    null = floats or not counts.has_null_count or counts.null_count > 0
    if isinstance(test, IsNull):
        return null, True, False
    if not counts.has_min_max or not any(is_kind(kind) for is_kind in _ORDERED):
        return True, True, null
    try:
        bounds = pa.array([counts.min, counts.max], kind)
        if bounds.null_count or (floats and any(map(math.isnan, bounds.to_pylist()))):
            return True, True, null
        yes, no = within(test, bounds[:1], bounds[1:])
        return yes[0].as_py(), no[0].as_py(), null
    except (pa.ArrowException, InputError, TypeError, ValueError, OverflowError):
        return True, True, null
