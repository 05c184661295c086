"""The types of table formats, which have fewer than Arrow. Knows no tables and no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from glmbatch.errors import InputError
from glmbatch.store.tables.fitting import schema_text
from glmbatch.store.types import parts_of, with_parts
from glmbatch.store.values import holds_bytes, is_text, value_type

SAME = frozenset(
    {
        pa.bool_(),
        pa.int8(),
        pa.int16(),
        pa.int32(),
        pa.int64(),
        pa.float32(),
        pa.float64(),
        pa.date32(),
    }
)
# Table formats have no unsigned integers, and no dates in milliseconds. No value is lost.
WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.date64(): pa.date32(),
}
PLAIN = "Set data.format to parquet and data.output to a new folder"


@dataclass(frozen=True, slots=True)
class TableFormat:
    """A table format: its `name`, what `a_table` is called, and its `wider` types for others.

    `advice` is what to do when no such table can hold the files, `another` when this one cannot.
    If it `grows`, its columns never change but for more fields in a struct, because older versions
    share them.
    """

    name: str
    a_table: str
    wider: Mapping[pa.DataType, pa.DataType]
    advice: str
    another: str
    grows: bool = False


DELTA = TableFormat("Delta Lake", "a Delta table", WIDER, f"{PLAIN}.", "Set data.output.")
# It has no integers of less than 32 bits.
ICEBERG = TableFormat(
    "Iceberg",
    "an Iceberg table",
    {**WIDER, **dict.fromkeys((pa.int8(), pa.int16(), pa.uint8()), pa.int32())},
    f"{PLAIN}, without data.table.",
    "Set data.table to a new name.",
    grows=True,
)
FORMATS = {"delta": DELTA, "iceberg": ICEBERG}


def table_schema(
    form: TableFormat, where: str, schema: pa.Schema, typed: pa.Schema | None = None
) -> pa.Schema:
    """`schema` in the types of a table format.

    Unsigned integers get the next wider type, and times get microseconds. A column without a type
    (null) gets that of `typed`, else text. InputError, naming `where`, when the format has no type
    for a column.
    """
    fields = []
    for field in open_schema(form, where, schema):
        kind = field.type
        if typed is not None and field.name in typed.names:
            kind = typed.field(field.name).type
        fields.append(pa.field(field.name, filled(kind)))
    return pa.schema(fields, schema.metadata)


def open_schema(form: TableFormat, where: str, schema: pa.Schema) -> pa.Schema:
    """As `table_schema`, but a column without a type stays so."""
    return pa.schema([_field(form, where, field) for field in schema], schema.metadata)


def _field(form: TableFormat, where: str, field: pa.Field) -> pa.Field:
    kind = _type(form, field.type)
    if kind is None:
        raise InputError(
            f"{where}: column {field.name!r} has the type {field.type}, which {form.name} does not "
            f"have. {form.advice} Or leave the column out with data.columns."
        )
    return pa.field(field.name, kind, nullable=True)


def _type(form: TableFormat, kind: pa.DataType) -> pa.DataType | None:
    """The Arrow type of the format's counterpart of `kind`; None if there is none."""
    if pa.types.is_null(kind):
        return kind
    kind = value_type(kind)
    if is_text(kind):
        return pa.binary() if holds_bytes(kind) else pa.string()
    if pa.types.is_timestamp(kind):
        # The instant stays. Table formats have only UTC or no zone, and only microseconds.
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if kind in form.wider:
        return form.wider[kind]
    return kind if kind in SAME or pa.types.is_decimal128(kind) else _nested(form, kind)


def _nested(form: TableFormat, kind: pa.DataType) -> pa.DataType | None:
    parts = [_type(form, part.type) for part in parts_of(kind)]
    if not parts or None in parts:
        return None
    if pa.types.is_struct(kind):
        return pa.struct(list(zip([part.name for part in kind], parts, strict=True)))
    return pa.map_(*parts) if pa.types.is_map(kind) else pa.list_(parts[0])


def common_type(one: pa.DataType, other: pa.DataType, *, grows: bool) -> pa.DataType | None:
    """The type that `one` and `other` share, where null counts as any type; None without one.

    If it `grows`, a struct has the fields of both.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if grows and pa.types.is_struct(one) and pa.types.is_struct(other):
        return _both_structs(one, other)
    ours, theirs = parts_of(one), parts_of(other)
    names = [part.name for part in ours]
    others = [part.name for part in theirs]
    if one.id != other.id or not ours or (pa.types.is_struct(one) and names != others):
        return None
    parts = []
    for our_part, their_part in zip(ours, theirs, strict=True):
        part = common_type(our_part.type, their_part.type, grows=grows)
        if part is None:
            return None
        parts.append(our_part.with_type(part))
    return with_parts(one, parts)


def _both_structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    fields = {field.name: field for field in one}
    for field in other:
        kind = common_type(fields.get(field.name, field).type, field.type, grows=True)
        if kind is None:
            return None
        fields[field.name] = field.with_type(kind)
    return pa.struct(list(fields.values()))


def filled(kind: pa.DataType) -> pa.DataType:
    """`kind` with text in place of null, at any depth."""
    if pa.types.is_null(kind):
        return pa.string()
    return with_parts(kind, [part.with_type(filled(part.type)) for part in parts_of(kind)])


def typed_text(columns: pa.Schema, types: pa.Schema) -> str:
    """The types in `types` of those `columns` that have none, as text (see `schema_text`).

    The text is empty if there are none.
    """
    fields = []
    for field in columns:
        kind = _typed_as(field.type, types.field(field.name).type)
        if filled(field.type) != kind:
            fields.append(pa.field(field.name, kind))
    return schema_text(pa.schema(fields)) if fields else ""


def _typed_as(own: pa.DataType, kind: pa.DataType) -> pa.DataType:
    """`own` with the types of `kind`, which has at least its parts, in place of null."""
    if pa.types.is_null(own):
        return kind
    theirs = parts_of(kind)
    if pa.types.is_struct(own):
        theirs = [kind.field(field.name) for field in own]
    parts = []
    for part, their_part in zip(parts_of(own), theirs, strict=True):
        parts.append(part.with_type(_typed_as(part.type, their_part.type)))
    return with_parts(own, parts)
