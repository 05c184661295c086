"""Show the rows of a table's file with the columns that the table has. Knows no format of tables.

A file keeps the columns that its table had when the file was written. A column that was added since
is null in all of its rows, and one whose type was widened has its values in the wider type. What
differs is carried as text: an Arrow schema in base64, empty if nothing does.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.ipc

from glmbatch.errors import UnusableFile
from glmbatch.store.types import converted, parts_of
from glmbatch.store.values import holds_bytes, is_text, value_type


def differing(where: str, file: pa.Schema, table: pa.Schema) -> str:
    """The columns of `table` that a file with the schema `file` lacks or has in narrower types.

    UnusableFile, naming `where`, for a type that does not widen to that of the table.
    """
    fields = []
    for field in table:
        if field.name in file.names:
            own = file.field(file.names.index(field.name)).type
            if _alike(own, field.type):
                continue
            if not _widens(value_type(own), field.type):
                raise UnusableFile(
                    f"{where}: column {field.name!r} is {own}, and {field.type} in the table. "
                    "Rewrite the table's files."
                )
        fields.append(pa.field(field.name, field.type))
    return schema_text(pa.schema(fields)) if fields else ""


def schema_text(schema: pa.Schema) -> str:
    """The schema as text."""
    return b64encode(schema.serialize()).decode()


def schema_in(text: str) -> pa.Schema:
    """The schema in a text of `schema_text`; without columns if the text is empty."""
    return pa.ipc.read_schema(pa.py_buffer(b64decode(text))) if text else pa.schema([])


def fitted_fields(fields: Sequence[pa.Field], text: str) -> list[pa.Field]:
    """The `fields` of a file with the types of the table, and those that it lacks at the end."""
    table = schema_in(text)
    kinds = {field.name: field for field in table}
    own = [kinds.pop(field.name, field) for field in fields]
    return [*own, *kinds.values()]


def fitted_rows(rows: pa.RecordBatch, text: str, columns: Sequence[str] | None) -> pa.RecordBatch:
    """The `rows` of a file as the table has them, with all columns or those of `columns`.

    UnusableFile when a value does not fit the type of the table.
    """
    for field in schema_in(text):
        if field.name in rows.schema.names:
            at = rows.schema.names.index(field.name)
            rows = rows.set_column(at, field, _widened(rows.column(at), field))
        elif columns is None or field.name in columns:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows


def _widened(column: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return converted(column, value_type(column.type)).cast(field.type)
    except pa.ArrowException as error:
        raise UnusableFile(f"column {field.name!r} as {field.type}: {error}") from error


def _alike(own: pa.DataType, other: pa.DataType) -> bool:
    """Whether values of both types are read as the same: texts, and instants of any unit."""
    own, other = value_type(own), value_type(other)
    if pa.types.is_null(own) or pa.types.is_null(other):
        return bool(own == other)
    if is_text(own) and is_text(other):
        return holds_bytes(own) == holds_bytes(other)
    if pa.types.is_timestamp(own) and pa.types.is_timestamp(other):
        return True
    ours, theirs = parts_of(own), parts_of(other)
    if not ours or len(ours) != len(theirs) or _shape(own) != _shape(other):
        return bool(own == other)
    return all(_alike(one.type, two.type) for one, two in zip(ours, theirs, strict=True))


def _shape(kind: pa.DataType) -> object:
    """What two nested types share besides the types inside: lists of any kind, the same names."""
    if pa.types.is_struct(kind):
        return [part.name for part in parts_of(kind)]
    return "map" if pa.types.is_map(kind) else "list"


def _widens(own: pa.DataType, other: pa.DataType) -> bool:
    """Whether each value of the type `own` is one of the type `other`."""
    if pa.types.is_null(own) or _alike(own, other):
        return True
    ours, theirs = parts_of(own), parts_of(other)
    if not ours or not theirs:
        return _number_widens(own, other)
    if not (pa.types.is_struct(own) and pa.types.is_struct(other)):
        pairs = zip(ours, theirs, strict=False)
        return _shape(own) == _shape(other) and all(_widens(a.type, b.type) for a, b in pairs)
    kinds = {part.name: part.type for part in theirs}
    # A field of a struct that was added later is null too.
    return all(part.name in kinds and _widens(part.type, kinds[part.name]) for part in ours)


def _number_widens(own: pa.DataType, other: pa.DataType) -> bool:
    """As `_widens`, for numbers and dates."""
    widens = False
    is_integer = pa.types.is_integer(own)
    if pa.types.is_decimal(other) and (is_integer or pa.types.is_decimal(own)):
        scale = 0 if is_integer else own.scale
        whole = len(str(2 ** (own.bit_width - 1))) if is_integer else own.precision - scale
        widens = scale <= other.scale and whole <= other.precision - other.scale
    elif is_integer and pa.types.is_integer(other):
        widens = own.bit_width < other.bit_width
    elif pa.types.is_float64(other):
        widens = pa.types.is_float32(own) or (is_integer and own.bit_width <= 32)
    elif pa.types.is_timestamp(other):
        widens = pa.types.is_date(own) and other.tz is None
    return bool(widens)
