"""The type of a source's column in the output, and the conversion of its values. Reads no rows.

A type stays the same if Arrow can write it. A UUID becomes its text of 36 characters, because Spark
refuses every file that contains a UUID. An ENUM becomes text, because Arrow reads it as bytes.
Arrow's views of texts and bytes become these: Arrow (26.0) cannot write all of them, or take rows.
Types that Arrow would write as bare bytes, such as DuckDB's intervals, are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glmbatch.errors import UnusableFile

Rows = TypeVar("Rows", pa.RecordBatch, pa.Table)
COLUMN_ID = re.compile(rb"field.?id|columnMapping|iceberg", re.IGNORECASE)
# Parquet's logical types that Arrow reads as what they are, or as bytes that no reader mistakes.
CARRIED = frozenset(
    {"None", "Null", "String", "Enum", "JSON", "BSON", "UUID", "List", "Map"}
    | {"Int", "Decimal", "Float16", "Date", "Time", "Timestamp"}
)
GROUP = re.compile(r"^ *\w+ group field_id=-?\d+ (.*?)(?: \((\w+).*\))? \{$", re.MULTILINE)


def parts_of(kind: pa.DataType) -> list[pa.Field]:
    """The fields that a nested type consists of; [] for any other type."""
    if pa.types.is_map(kind):
        return [kind.key_field, kind.item_field]
    if not pa.types.is_nested(kind):
        return []
    return [kind.field(at) for at in range(kind.num_fields)]


def with_parts(kind: pa.DataType, parts: Sequence[pa.Field]) -> pa.DataType:
    """The nested type `kind` with other `parts`; `kind` itself if it is not nested."""
    if pa.types.is_struct(kind):
        return pa.struct(parts)
    if pa.types.is_map(kind):
        return pa.map_(*parts, keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(parts[0], kind.list_size)
    for is_of_kind, make in (
        (pa.types.is_list, pa.list_),
        (pa.types.is_large_list, pa.large_list),
        (pa.types.is_list_view, pa.list_view),
        (pa.types.is_large_list_view, pa.large_list_view),
    ):
        if is_of_kind(kind):
            return make(parts[0])
    return kind


def written_field(field: pa.Field) -> pa.Field:
    """`field` as the output has it, without the ids with which some readers look up columns.

    Such a reader would not find our own columns, which have no ids.
    """
    metadata = {k: v for k, v in (field.metadata or {}).items() if not COLUMN_ID.search(k)}
    return pa.field(field.name, written_type(field.type), field.nullable, metadata or None)


def written_fields(file: pq.ParquetFile) -> list[pa.Field]:
    """The columns of `file` as the output has them."""
    enums = {leaf.path for leaf in leaves(file) if _kind(leaf) == "Enum"}
    fields = []
    for field in map(written_field, file.schema_arrow):
        is_enum = field.name in enums and pa.types.is_binary(field.type)
        fields.append(field.with_type(pa.string()) if is_enum else field)
    return fields


def written_type(kind: pa.DataType) -> pa.DataType:
    """The type of values of `kind` in the output."""
    if isinstance(kind, pa.UuidType) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    return with_parts(kind, [written_field(part) for part in parts_of(kind)])


def converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values of `array` in the type `kind`. pa.ArrowException when a value would change."""
    if array.type == kind:
        return array
    if not _needs_parts(array.type):
        return array.cast(kind)
    if isinstance(array.type, pa.UuidType) and pa.types.is_string(kind):
        texts = [None if v is None else str(UUID(bytes=v)) for v in array.storage.to_pylist()]
        return pa.array(texts, kind)
    if isinstance(array.type, pa.BaseExtensionType):
        return converted(array.storage, kind)
    return _converted_nested(array, kind)


def take_rows(rows: Rows, places: Sequence[int] | np.ndarray) -> Rows:
    """The rows at `places`, in their order. Arrow itself takes none from columns of views."""
    places = np.asarray(places, np.int64)
    try:
        return rows.take(pa.array(places))
    except pa.ArrowNotImplementedError:
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        parts = [rows.slice(run[0], len(run)) for run in runs if len(run)] or [rows.slice(0, 0)]
        if isinstance(rows, pa.Table):
            return pa.concat_tables(parts).combine_chunks()
        columns = [pa.concat_arrays(column) for column in zip(*parts, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=rows.schema)


def _needs_parts(kind: pa.DataType) -> bool:
    """Whether Arrow cannot cast the type itself, so that its parts must be converted."""
    if isinstance(kind, pa.BaseExtensionType) or _is_view(kind):
        return True
    return any(_needs_parts(part.type) for part in parts_of(kind))


def _converted_nested(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Convert part by part, because Arrow casts neither nested extension types nor views."""
    is_null = array.is_null()
    if pa.types.is_struct(array.type):
        columns = []
        for at, field in enumerate(kind):
            columns.append(converted(array.field(at), field.type))
        return pa.StructArray.from_arrays(columns, fields=list(kind), mask=is_null)
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        values = array.values.slice(array.offset * size, len(array) * size)
        inner = converted(values, kind.value_type)
        same_size = pa.list_(kind.value_field, size)
        lists = pa.FixedSizeListArray.from_arrays(inner, type=same_size, mask=is_null)
        return lists.cast(kind)
    # Offsets are copied, because Arrow does not accept those of a slice together with a mask.
    if pa.types.is_map(array.type):
        offsets = pa.array(array.offsets.to_numpy())
        keys = converted(array.keys, kind.key_type)
        items = converted(array.items, kind.item_type)
        return pa.MapArray.from_arrays(offsets, keys, items, type=kind, mask=is_null)
    if _is_view(array.type):
        view = _converted_view(array, kind.value_field, is_null)
        if view.type == kind:
            return view
        # Not cast, because Arrow's own cast of a view gives an invalid array.
        lengths = pc.fill_null(pc.list_value_length(view), 0)
        ends = pc.cumulative_sum(lengths.cast(pa.int64()))
        offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends])
        inner = view.flatten()
    else:
        offsets = pa.array(array.offsets.to_numpy(), pa.int64())
        inner = converted(array.values, kind.value_type)
    large = pa.large_list(kind.value_field)
    return pa.LargeListArray.from_arrays(offsets, inner, type=large, mask=is_null).cast(kind)


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _converted_view(array: pa.Array, items: pa.Field, is_null: pa.Array) -> pa.Array:
    """The same view over converted items: Arrow cannot reorder extension types."""
    is_large = pa.types.is_large_list_view(array.type)
    make = pa.LargeListViewArray if is_large else pa.ListViewArray
    # Copied, as in `_converted_nested`.
    places = [pa.array(part.to_numpy()) for part in (array.offsets, array.sizes)]
    inner = converted(array.values, items.type)
    return make.from_arrays(*places, inner, type=with_parts(array.type, [items]), mask=is_null)


def inner_arrays(array: pa.Array) -> list[pa.Array]:
    """The arrays inside a nested array, limited to its own rows; [] for any other array."""
    if pa.types.is_struct(array.type):
        return list(array.flatten())
    if pa.types.is_map(array.type):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return [part.slice(first, last - first) for part in (array.keys, array.items)]
    if not pa.types.is_nested(array.type):
        return []
    # Without extension types, because Arrow cannot flatten views of them.
    return [converted(array, _stored_type(array.type)).flatten()]


def _stored_type(kind: pa.DataType) -> pa.DataType:
    """`kind` without extension types, at any depth."""
    if isinstance(kind, pa.BaseExtensionType):
        return _stored_type(kind.storage_type)
    parts = [part.with_type(_stored_type(part.type)) for part in parts_of(kind)]
    return with_parts(kind, parts)


def check_carried(where: str, file: pq.ParquetFile) -> None:
    """UnusableFile when Arrow cannot write a column of `file` with its type; `where` names it."""
    for column, kind in _lost(file):
        raise UnusableFile(
            f"{where}: column {column!r} is of Parquet's type {kind}, which would be written as "
            "bare bytes. Cast it to another type, or leave it out."
        )
    adjusted = {kind for kind in map(_adjusted_time, leaves(file)) if kind is not None}
    if len(adjusted) > 1:
        raise UnusableFile(
            f"{where}: has times of day both in UTC and without a zone, which Arrow cannot write "
            "to one file. Cast one column to another type, or leave it out."
        )


def leaves(file: pq.ParquetFile) -> Iterator[Any]:
    """The leaf columns of the Parquet schema, into which nested columns are split."""
    for at in range(len(file.schema)):
        yield file.schema.column(at)


def is_int96(leaf: Any) -> bool:
    """Whether a leaf column has INT96 times, the deprecated type that Spark and Impala write."""
    return bool(leaf.physical_type == "INT96")


def has_int96(file: pq.ParquetFile) -> bool:
    """Whether `file` has INT96 times in any column, at any depth."""
    return any(map(is_int96, leaves(file)))


def changes_type(leaf: Any) -> bool:
    """Whether the output may have a leaf column in another type than Arrow reads."""
    return is_int96(leaf) or _kind(leaf) == "Enum"


def _kind(leaf: Any) -> str:
    return str(leaf.logical_type).split("(")[0]


def _lost(file: pq.ParquetFile) -> Iterator[tuple[str, str]]:
    for leaf in leaves(file):
        kind = _kind(leaf)
        is_inner_enum = kind == "Enum" and leaf.path not in file.schema_arrow.names
        if kind not in CARRIED or is_inner_enum:
            yield leaf.path, kind.upper()
    for group in GROUP.finditer(str(file.schema)):
        if group[2] is not None and group[2] not in CARRIED:
            yield group[1], group[2].upper()


def _adjusted_time(leaf: Any) -> bool | None:
    """Whether a leaf column of times of day is in UTC; None if it has another type."""
    if leaf.logical_type.type != "TIME":
        return None
    return "isAdjustedToUTC=true" in str(leaf.logical_type)


def times_in_utc(file: pq.ParquetFile) -> bool:
    """Whether the times of day in `file` are in UTC; False if it has none."""
    return any(map(_adjusted_time, leaves(file)))
