"""The values of a column as text, as a person would write them. Knows no files and no prompts."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.store.types import converted

LAST_ZEROS = re.compile(r"(\.\d*?)0+(?!\d)")
TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # in a second
DAY_SECONDS = 86_400
# The two texts of a struct that is a turn of a conversation, or two of them.
TURNS = (("role", "content"), ("question", "answer"))


def is_text(kind: pa.DataType) -> bool:
    """Whether this type is text, or the null type that pandas writes for a column without values.

    Bytes count as text.
    """
    kind = value_type(kind)
    return bool(
        pa.types.is_null(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a type of text (see `is_text`) holds bytes, of any encoding or none."""
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(bool(is_kind(kind)) for is_kind in is_bytes)


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values themselves, without dictionaries and extension types."""
    while True:
        if isinstance(kind, pa.UuidType):
            return pa.string()
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def is_plain(kind: pa.DataType) -> bool:
    """Whether values of this type can be written as text: text, number, boolean, date or time."""
    kind = value_type(kind)
    return is_text(kind) or bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or (pa.types.is_temporal(kind) and not pa.types.is_interval(kind))
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this type are lists, in any of Arrow's forms of them."""
    kind = value_type(kind)
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def is_turns(kind: pa.DataType) -> bool:
    """Whether values of this type are lists of turns: structs of two texts (`TURNS`), or pairs.

    A list without values of a type, which all empty lists are, counts too.
    """
    kind = value_type(kind)
    if pa.types.is_null(kind):
        return True
    if not is_list(kind):
        return False
    turn = value_type(kind.value_type)
    if pa.types.is_null(turn) or _turn_texts(turn):
        return True
    return is_list(turn) and is_text(turn.value_type)


def turn_values(column: pa.ChunkedArray) -> list[list[Any] | None]:
    """The turns in a column of `is_turns`, row by row: each a list, or a mapping of its two texts.

    Texts are as in `prompt_values`.
    """
    values: list[list[Any] | None] = []
    for chunk in column.chunks:
        values += _nested(chunk)
    return values


def _nested(array: pa.Array) -> list[Any]:
    kind = value_type(array.type)
    if kind != array.type:
        array = converted(array, kind)
    if is_list(kind):
        items = iter(_nested(pc.list_flatten(array)))
        lengths = pc.list_value_length(array).to_pylist()
        return [None if length is None else list(islice(items, length)) for length in lengths]
    if not pa.types.is_struct(kind):
        return _values(array)
    names = _turn_texts(kind)
    texts = [_nested(pc.struct_field(array, [name])) for name in names]
    turns = []
    for is_valid, *row in zip(array.is_valid().to_pylist(), *texts, strict=True):
        turns.append(dict(zip(names, row, strict=True)) if is_valid else None)
    return turns


def _turn_texts(kind: pa.DataType) -> tuple[str, ...]:
    """The names of the two texts in a struct that is a turn; () if it is none."""
    if not pa.types.is_struct(kind):
        return ()
    of_name = {field.name: field.type for field in kind.fields}
    for names in TURNS:
        if all(name in of_name and is_text(of_name[name]) for name in names):
            return names
    return ()


def prompt_values(column: pa.ChunkedArray) -> list[str | bytes | None]:
    """The values of a column as text, in order; bytes if not UTF-8, None for null and NaN."""
    values: list[str | bytes | None] = []
    for chunk in column.chunks:
        values += _values(chunk)
    return values


def _values(array: pa.Array) -> list[str | bytes | None]:
    kind = array.type
    if isinstance(kind, pa.Bool8Type):
        return [None if value is None else str(value) for value in array.to_pylist()]
    inner = value_type(kind)
    if kind != inner:
        array = converted(array, inner)
    if pa.types.is_duration(inner):
        return [_duration(value, inner.unit) for value in array.cast(pa.int64()).to_pylist()]
    if pa.types.is_temporal(inner):
        return [_short_time(value) for value in _times(array).to_pylist()]
    if pa.types.is_floating(inner):
        return _floats(array)
    if not is_text(inner):
        return [None if value is None else _plain(value) for value in array.to_pylist()]
    if pa.types.is_string_view(inner):
        array = array.cast(pa.large_string())
    # As bytes first: Arrow does not check text, and one byte that is not UTF-8 would end the run.
    return [_decoded(value) for value in array.cast(pa.large_binary()).to_pylist()]


def _plain(value: object) -> str:
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _floats(array: pa.Array) -> list[str | bytes | None]:
    """The shortest text of each number in its own precision; None for NaN."""
    # Python's float is a double, so narrower types need NumPy's.
    narrow = {pa.float32(): np.float32, pa.float16(): np.float16}.get(array.type, float)
    texts: list[str | bytes | None] = []
    for value in array.to_pylist():
        texts.append(None if value is None or math.isnan(value) else str(narrow(value)))
    return texts


def _times(array: pa.Array) -> pa.Array:
    """The text of each time, from Arrow, because Python has no dates after the year 9999."""
    try:
        return array.cast(pa.string())
    except pa.ArrowInvalid:  # a time zone that this machine does not know
        return array.cast(pa.timestamp(array.type.unit, "UTC")).cast(pa.string())


def _short_time(value: str | None) -> str | None:
    if value is None:
        return None
    return LAST_ZEROS.sub(lambda zeros: "" if zeros[1] == "." else zeros[1], value, count=1)


def _duration(ticks: int | None, unit: str) -> str | None:
    """A duration of `ticks` in `unit` as text, such as `1 day 02:03:04.5`."""
    if ticks is None:
        return None
    seconds, rest = divmod(abs(ticks), TICKS[unit])
    days, seconds = divmod(seconds, DAY_SECONDS)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours:02}:{minutes:02}:{seconds:02}"
    if rest:
        digits = len(str(TICKS[unit])) - 1
        text += f".{rest:0{digits}}".rstrip("0")
    if days:
        text = f"{days} {'day' if days == 1 else 'days'} {text}"
    return f"-{text}" if ticks < 0 else text


def _decoded(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
