"""For which rows a condition holds. Arrow columns in, one answer for each row out.

As in SQL, a test of a value that is null says neither yes nor no; only `is null` sees it. NaN is
null here, as it is in a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError
from glmbatch.settings.conditions import (
    Both,
    Compares,
    Condition,
    Either,
    Has,
    IsNull,
    IsOneOf,
    IsTrue,
    Not,
    Test,
    Value,
    tests_of,
)
from glmbatch.store.types import converted
from glmbatch.store.values import is_text, value_type

SIGNS = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
# Wide enough for the digits of any number that a condition or a column has.
DIGITS = 76


def check_tests(
    condition: Condition,
    kinds: Mapping[str, pa.DataType],
    where: tuple[str, str],
    folders: Mapping[str, str | None] | None = None,
) -> None:
    """InputError when a column of `kinds` has a type that `condition` cannot test.

    `folders` are the columns that folder names give, with their values: texts that may be compared
    with a number, or with true and false, if they spell one. `where` has the place of the columns
    and the setting of the condition, for the message.
    """
    given = folders or {}
    for test in tests_of(condition):
        if test.column in kinds or test.column in given:
            try:
                if test.column in given:
                    outcomes_of(test, pa.array([given[test.column]], pa.string()))
                else:
                    _check_kind(test, kinds[test.column])
            except InputError as error:
                raise InputError(f"{where[0]}: {error}. Set {where[1]}.") from error


def _check_kind(test: Test, kind: pa.DataType) -> None:
    """InputError when a column of this type cannot be tested so, whatever its values are."""
    for value in _wanted(test):
        if is_text(kind) and not pa.types.is_null(kind) and not isinstance(value, str):
            raise _incomparable(test, kind, value)
    outcomes_of(test, pa.array([], kind))


def rows_where(
    condition: Condition,
    columns: Mapping[str, pa.ChunkedArray],
    unknown: Mapping[str, pa.ChunkedArray] | None = None,
) -> list[bool | None]:
    """Whether `condition` holds for each row of `columns`, in order.

    `unknown` says of some columns in which rows their values are not known yet. None for a row in
    which these decide.
    """
    unsure = unknown or {}
    possible = joined(condition, lambda test: _possible(test, columns[test.column], unsure))
    certain = pc.invert(pc.or_(possible.no, possible.null))
    rows = pc.if_else(pc.equal(possible.yes, certain), possible.yes, None)
    holds: list[bool | None] = rows.to_pylist()
    return holds


def where_holds(condition: Condition, columns: Mapping[str, pa.ChunkedArray]) -> pa.Array:
    """For each row of `columns` whether `condition` surely holds: true or false, never null."""
    return joined(condition, lambda test: _possible(test, columns[test.column], {})).yes


class Possible(NamedTuple):
    """For each row, whether a condition may be met, may be missed, and may hinge on a null."""

    yes: pa.Array
    no: pa.Array
    null: pa.Array

    def __invert__(self) -> Possible:
        return Possible(self.no, self.yes, self.null)

    def __and__(self, other: Possible) -> Possible:
        # As in SQL: no with anything is no, and yes with null is null.
        mine = pc.and_(self.null, pc.or_(other.null, other.yes))
        null = pc.or_(mine, pc.and_(self.yes, other.null))
        return Possible(pc.and_(self.yes, other.yes), pc.or_(self.no, other.no), null)


def joined(condition: Condition, possible: Callable[[Test], Possible]) -> Possible:
    """What is possible for `condition`, from what is for each test."""
    if isinstance(condition, Not):
        return ~joined(condition.part, possible)
    if isinstance(condition, Both | Either):
        first = joined(condition.first, possible)
        second = joined(condition.second, possible)
        return first & second if isinstance(condition, Both) else ~(~first & ~second)
    return possible(condition)


def _possible(
    test: Test, column: pa.ChunkedArray, unknown: Mapping[str, pa.ChunkedArray]
) -> Possible:
    chunks = [outcomes_of(test, chunk) for chunk in column.chunks]
    outcomes = pa.concat_arrays([pa.array([], pa.bool_()), *chunks])
    parts = (outcomes.fill_null(fill_value=False), pc.invert(outcomes).fill_null(fill_value=False))
    if test.column not in unknown:
        return Possible(*parts, outcomes.is_null())
    # What is not known may be anything.
    mask = pa.concat_arrays([pa.array([], pa.bool_()), *unknown[test.column].chunks])
    return Possible(*(pc.or_(part, mask) for part in (*parts, outcomes.is_null())))


def outcomes_of(test: Test, column: pa.Array) -> pa.Array:
    """The outcome of `test` for each value, null for null. InputError for a type it cannot test."""
    if isinstance(test, Has):
        return _having(test, column)
    values = _plain(column)
    if isinstance(test, IsNull):
        return values.is_null()
    if pa.types.is_null(values.type):
        return pa.nulls(len(values), pa.bool_())
    if isinstance(test, IsTrue):
        if not pa.types.is_boolean(values.type):
            raise InputError(
                f"column {test.column!r} holds {column.type}, which is neither true nor false "
                "alone: compare it with a value"
            )
        return values
    outcomes = None
    for value in _wanted(test):
        sides = values
        if pa.types.is_large_binary(values.type) and not isinstance(value, str):
            sides = _spelt(test, values, value)  # of folder names; `check_tests` refuses others
        try:
            outcome = SIGNS[_sign(test)](*_sides(sides, value, _sign(test)))
        except (TypeError, pa.ArrowException) as error:
            raise _incomparable(test, column.type, value) from error
        outcomes = outcome if outcomes is None else pc.or_kleene(outcomes, outcome)
    return outcomes


def _wanted(test: Test) -> Sequence[Value]:
    """The values that a test compares with, one after another."""
    if isinstance(test, Compares):
        return (test.value,)
    return test.values if isinstance(test, IsOneOf) else ()


def _sign(test: Test) -> str:
    return test.sign if isinstance(test, Compares) else "=="


def _incomparable(test: Test, kind: pa.DataType, value: Value) -> InputError:
    hint = f"; write {value!r} in {test.column}" if _is_list(kind) else ""
    return InputError(
        f"column {test.column!r} holds {kind}, which cannot be compared as "
        f"{_sign(test)} {value!r}{hint}"
    )


def _spelt(test: Test, texts: pa.Array, value: Value) -> pa.Array:
    """What `texts` spell of the kind of `value`: numbers, null for NaN, or true and false.

    InputError for one that spells none.
    """
    truth = isinstance(value, bool)
    kind = pa.bool_() if truth else pa.decimal256(DIGITS, 30)
    encoded = texts.dictionary_encode()
    values = []
    for written in encoded.dictionary.to_pylist():
        text = written.decode(errors="backslashreplace")
        try:
            values.append(_truth(text) if truth else _number(text))
        except (InvalidOperation, KeyError) as error:
            raise InputError(
                f"column {test.column!r} is {text!r} here, which is compared with "
                + ("true or false" if truth else "a number")
            ) from error
    return pa.array(values, kind).take(encoded.indices)


def _number(text: str) -> Decimal | None:
    number = Decimal(text)
    return number if number.is_finite() else None


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _having(test: Has, column: pa.Array) -> pa.Array:
    """Whether each list has the value; null for null, and where only a null could be the value."""
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.bool_())
    refused = f"column {test.column!r} holds {column.type}, which cannot be searched for"
    if not _is_list(column.type):
        raise InputError(f"{refused} {test.value!r}; it is no list")
    items = _plain(pc.list_flatten(column))
    try:
        equal = pc.equal(*_sides(items, test.value, "=="))
    except (TypeError, pa.ArrowException) as error:
        raise InputError(f"{refused} {test.value!r}") from error
    # Arrow's own numbers of the lists are wrong for a slice.
    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    rows = pa.array(np.arange(len(column)).repeat(lengths))
    numbers = pa.array(np.arange(len(column)))
    found = pc.is_in(numbers, rows.filter(equal))
    unsure = pc.or_(column.is_null(), pc.is_in(numbers, rows.filter(equal.is_null())))
    return pc.if_else(pc.and_(unsure, pc.invert(found)), pa.scalar(None, pa.bool_()), found)


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _plain(column: pa.Array) -> pa.Array:
    """The values of a column without encodings, text as bytes, and NaN as null."""
    kind = value_type(column.type)
    column = converted(column, kind)
    if is_text(kind) and not pa.types.is_null(kind):
        if pa.types.is_string_view(kind):
            column = converted(column, pa.large_string())
        # Arrow does not check text. Bytes in UTF-8 have the order of their characters.
        return column.cast(pa.large_binary())
    if pa.types.is_float16(kind):
        column = column.cast(pa.float32())
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column


def _sides(values: pa.Array, value: Value, sign: str) -> tuple[pa.Array, pa.Scalar]:
    """Both sides of a comparison in one type, without rounding. TypeError when there is none."""
    kind = values.type
    if pa.types.is_large_binary(kind) and isinstance(value, str):
        return values, pa.scalar(value.encode(), kind)
    if pa.types.is_boolean(kind) and isinstance(value, bool) and sign in ("==", "!="):
        return values, pa.scalar(value)
    if pa.types.is_temporal(kind) and isinstance(value, str):
        return values, pa.scalar(value).cast(kind)
    if isinstance(value, str | bool):
        raise TypeError(value)
    if pa.types.is_floating(kind):
        # In the column's own precision, in which 0.1 is the 0.1 that a person reads there.
        return values, pa.scalar(float(value), pa.float64()).cast(kind)
    if pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        exact = Decimal(repr(value))
        places = max(0, -int(exact.as_tuple().exponent), getattr(kind, "scale", 0))
        both = pa.decimal256(DIGITS, places)
        return values.cast(both), pa.scalar(exact).cast(both)
    raise TypeError(value)
