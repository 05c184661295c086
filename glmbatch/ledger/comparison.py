"""Compare the columns of a source with an output, row by row. Knows no manifest.

Both files are opened once and read in batches of all columns, so each page is read once and memory
holds two batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glmbatch.errors import UnusableFile
from glmbatch.ledger.fragments import Fragment
from glmbatch.ledger.receipts import whole_digest
from glmbatch.settings.conditions import columns_of, parse_condition
from glmbatch.store.files import version_stamp
from glmbatch.store.inputs.filters import holding
from glmbatch.store.lines.form import Form
from glmbatch.store.lines.stored import store_lines, stored_lines
from glmbatch.store.parquet import open_parquet, read_opened
from glmbatch.store.paths import AnyPath
from glmbatch.store.tables.fitting import columns_in_file, fitted_fields, fitted_rows
from glmbatch.store.times import ALL_ROWS, int96_unit
from glmbatch.store.types import (
    changes_type,
    converted,
    has_int96,
    inner_arrays,
    leaves,
    parts_of,
    take_rows,
    written_type,
)

# A column's name, and its positions in the output and in the source.
Pair = tuple[str, int, int]


class Sources:
    """The sources of an output, each digested once. Rows of lines are stored in `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._digests: dict[AnyPath, str] = {}
        self._stored: dict[AnyPath, AnyPath] = {}

    def digest(self, path: AnyPath) -> str:
        """The digest of a source; empty if it cannot be read."""
        if path not in self._digests:
            self._digests[path] = whole_digest(path) or ""
        return self._digests[path]

    def parquet(self, path: AnyPath, fragment: Fragment) -> AnyPath:
        """The Parquet file with the rows of the source of `fragment`, which is now at `path`."""
        if not fragment.reading:
            return path
        form = Form.model_validate_json(fragment.reading)
        stored = stored_lines(self._folder, fragment.digest, form)
        store_lines(path, form, stored, version_stamp(path), fragment.digest)
        self._stored[path] = stored
        return stored

    def rows(self, path: AnyPath) -> int | None:
        """The number of rows of a source of which a file was compared; None if it is unknown."""
        try:
            with open_parquet(self._stored.get(path, path)) as file:
                return int(file.metadata.num_rows)
        except (UnusableFile, OSError):
            return None


@contextmanager
def open_source(path: AnyPath, fragment: Fragment) -> Iterator[tuple[pq.ParquetFile, bool]]:
    """The open file at `path` with the source's rows, and whether a column may change its type.

    INT96 times are read in the unit that holds those of `fragment`. UnusableFile when the file
    cannot be read.
    """
    with ExitStack() as opened:
        file = opened.enter_context(open_parquet(path))
        other_types = any(map(changes_type, leaves(file)))
        if has_int96(file):
            most = ALL_ROWS if fragment.span else fragment.rows
            rows = (fragment.row_groups, fragment.skip_rows, most)
            unit = int96_unit(path, *rows)
            if unit != "us":
                file = opened.enter_context(open_parquet(path, unit))
        yield file, other_types


def source_rows(source: pq.ParquetFile, fragment: Fragment) -> Iterator[pa.RecordBatch]:
    """The rows of the open `source` that `fragment` covers and that meet its condition.

    They are read and tested again: the row numbers in the fragment are not used.
    """
    for batch, holds in _tested(source, fragment, None):
        rows = fitted_rows(batch, fragment.fitted, None)
        yield rows if holds is None else take_rows(rows, rows_where(holds))


def kept_count(source: pq.ParquetFile, fragment: Fragment) -> int:
    """The number of `source_rows`."""
    if not fragment.where:
        return fragment.rows
    columns = columns_of(parse_condition(fragment.where))
    return sum(holds.true_count for _, holds in _tested(source, fragment, columns))


def _tested(
    source: pq.ParquetFile, fragment: Fragment, columns: Sequence[str] | None
) -> Iterator[tuple[pa.RecordBatch, Any]]:
    """The rows that `fragment` covers, and whether each meets its condition; None without one."""
    condition = parse_condition(fragment.where) if fragment.where else None
    groups, skip = _groups(source, fragment)
    rows = (groups, skip, fragment.covered)
    read = None if columns is None else columns_in_file(columns, fragment.fitted)
    for batch in read_opened(source, *rows, columns=read, where=fragment.path):
        if condition is None:
            yield batch, None
        else:
            tested = fitted_rows(batch, fragment.fitted, columns_of(condition))
            yield batch, holding(condition, tested)


def _groups(source: pq.ParquetFile, fragment: Fragment) -> tuple[list[int], int]:
    """The row groups that `fragment` covers, and the rows of the first that it does not."""
    groups: list[int] = []
    skip = begin = 0
    for number in range(source.num_row_groups):
        end = begin + source.metadata.row_group(number).num_rows
        if begin < fragment.first_row + fragment.covered and fragment.first_row < end:
            skip = skip if groups else max(0, fragment.first_row - begin)
            groups.append(number)
        begin = end
    return groups, skip


def pair_columns(
    source: pq.ParquetFile, published: pq.ParquetFile, fragment: Fragment, steps: Sequence[str]
) -> tuple[list[Pair], list[str]]:
    """Pairs of the source's columns with the output's, and what is wrong with the output's.

    Answers of `steps` may have the names of columns that do not go out.
    """
    ours = _places(published.schema_arrow.names)
    pairs: list[Pair] = []
    faults: list[str] = []
    columns = fitted_fields(list(source.schema_arrow), fragment.fitted)
    for key, at in _places([field.name for field in columns]).items():
        name = key[0]
        if fragment.has_out(name):
            if key in ours:
                pairs.append((name, ours[key], at))
            else:
                faults.append(f"has no column {name!r}, which {fragment.path} has")
        elif key in ours and not any(name == step or name.startswith(f"{step}_") for step in steps):
            faults.append(f"has column {name!r}, which data.columns leaves out")
    return pairs, faults


def _places(names: Sequence[str]) -> dict[tuple[str, int], int]:
    """The position of each column, by its name and the number of earlier columns of that name."""
    places: dict[tuple[str, int], int] = {}
    counts: Counter[str] = Counter()
    for at, name in enumerate(names):
        places[name, counts[name]] = at
        counts[name] += 1
    return places


def rows_where(holds: pa.ChunkedArray | pa.Array) -> list[int]:
    """The numbers of the rows in which `holds` is true."""
    numbers: list[int] = pc.indices_nonzero(holds).to_pylist()
    return numbers


def differences(
    ours: Iterator[pa.RecordBatch],
    theirs: Iterator[pa.RecordBatch],
    pairs: Sequence[Pair],
    *,
    other_types: bool,
) -> Iterator[tuple[str, int]]:
    """For each column that differs, its name and the first row (from 0) that differs.

    `ours` are batches of the output, `theirs` of the source. With `other_types`, the output may
    store values in other types than the source.
    """
    first_row = 0
    pending = list(pairs)
    for our_batch, their_batch in _aligned(ours, theirs):
        same: list[Pair] = []
        for name, our_place, their_place in pending:
            one, other = our_batch.column(our_place), their_batch.column(their_place)
            row = _first_difference(one, other, other_types)
            if row is None:
                same.append((name, our_place, their_place))
            else:  # one row per column is enough
                yield name, first_row + row
        pending = same
        first_row += our_batch.num_rows


def _aligned(
    ours: Iterator[pa.RecordBatch], theirs: Iterator[pa.RecordBatch]
) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Pairs of batches with the same rows. Ends with the shorter of the two."""
    one, other = next(ours, None), next(theirs, None)
    while one is not None and other is not None:
        rows = min(one.num_rows, other.num_rows)
        yield one.slice(0, rows), other.slice(0, rows)
        one = one.slice(rows) if rows < one.num_rows else next(ours, None)
        other = other.slice(rows) if rows < other.num_rows else next(theirs, None)


def _first_difference(ours: pa.Array, theirs: pa.Array, other_types: bool) -> int | None:
    """The first row in which two columns differ; None if they are equal."""
    if ours.type != theirs.type and (other_types or ours.type == written_type(theirs.type)):
        with suppress(pa.ArrowException):
            theirs = converted(theirs, ours.type)
    if ours.type != theirs.type:
        return _first_unlike(ours.to_pylist(), theirs.to_pylist())
    if _same(ours, theirs):
        return None
    # By bisection of Arrow slices: Python cannot hold every value, such as a day in year 20000.
    same, rows = 0, len(ours)
    while rows - same > 1:
        middle = (same + rows) // 2
        if _same(ours.slice(0, middle), theirs.slice(0, middle)):
            same = middle
        else:
            rows = middle
    return same


def _first_unlike(ours: Sequence[object], theirs: Sequence[object]) -> int | None:
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            return row
    return None


def _same(ours: pa.Array, theirs: pa.Array) -> bool:
    """Whether two arrays of one type have the same values, with NaN equal to itself."""
    if ours.equals(theirs):
        return True
    kind = ours.type
    if pa.types.is_floating(kind):
        bits = {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[kind.bit_width]
        return bool(ours.view(bits).equals(theirs.view(bits)))
    if isinstance(kind, pa.BaseExtensionType):
        return _same(ours.storage, theirs.storage)
    parts = parts_of(kind)
    if not parts or not ours.is_null().equals(theirs.is_null()):
        return False
    if not pa.types.is_struct(kind) and not _lengths(ours).equals(_lengths(theirs)):
        return False
    pairs = zip(inner_arrays(ours), inner_arrays(theirs), strict=True)
    return all(_same(one, other) for one, other in pairs)


def _lengths(array: pa.Array) -> pa.Array:
    if pa.types.is_map(array.type):
        return pc.subtract(array.offsets.slice(1), array.offsets.slice(0, len(array)))
    return pc.list_value_length(array)
