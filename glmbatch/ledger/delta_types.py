"""Arrow types in the types of Delta Lake, which has fewer. Knows no tables and no files."""

from __future__ import annotations

import pyarrow as pa

from glmbatch.errors import InputError
from glmbatch.store.parquet import is_text

# Delta has no unsigned integers and no milliseconds of a day; nothing is lost on the way.
WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.date64(): pa.date32(),
}
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
HINT = "Set data.format to parquet, or leave the column out."


def delta_schema(where: str, schema: pa.Schema) -> pa.Schema:
    """`schema` in the types of Delta Lake. InputError, naming `where`, if a column has none.

    Unsigned integers become the next wider ones, times are cut to microseconds, text without a type
    becomes text.
    """
    return pa.schema([_delta_field(where, field) for field in schema], schema.metadata)


def _delta_field(where: str, field: pa.Field) -> pa.Field:
    kind = _delta_type(field.type)
    if kind is None:
        raise InputError(
            f"{where}: column {field.name!r} holds {field.type}, for which Delta Lake has no "
            f"type. {HINT}"
        )
    return pa.field(field.name, kind, nullable=True)


def _delta_type(kind: pa.DataType) -> pa.DataType | None:
    """The Arrow type that Delta Lake's type for `kind` reads as; None where there is none."""
    # A dictionary is a way to store values, which no Delta reader gives back.
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_text(kind):
        holds_bytes = (
            pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or pa.types.is_binary_view(kind)
        )
        return pa.binary() if holds_bytes else pa.string()
    if pa.types.is_timestamp(kind):
        # The instant stays; Delta knows UTC and no zone, and microseconds and nothing finer.
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    return (
        kind
        if kind in SAME or pa.types.is_decimal128(kind)
        else WIDER.get(kind, _delta_nested(kind))
    )


def _delta_nested(kind: pa.DataType) -> pa.DataType | None:
    parts = [kind.field(at).type for at in range(kind.num_fields)]
    inner = [_delta_type(part) for part in parts]
    if not inner or None in inner:
        return None
    if pa.types.is_struct(kind):
        names = [kind.field(at).name for at in range(kind.num_fields)]
        return pa.struct(list(zip(names, inner, strict=True)))
    if pa.types.is_map(kind):
        return pa.map_(_delta_type(kind.key_type), _delta_type(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(inner[0])
    return None
