"""Conditions on a row, such as `stars < 3 and language in ('de', 'en')`. Parsed, never executed.

Python's own parser reads the text, and only these forms of its grammar are accepted: a column by
its name or as column('any name'), compared with one value or several, searched for a value if it
is a list, tested for null or, if it is a boolean, alone; and such tests joined by `and`, `or` and
`not`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TypeGuard

Value = str | int | float | bool

SIGNS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
# The sign that says the same with the sides exchanged.
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
# As YAML and SQL spell them; a column of such a name is column('null').
CONSTANTS = {"null": None, "true": True, "false": False}
# Instead of the parser's advice, which is about Python.
ADVICE = (
    "write == for equality, `and`, `or`, `not` in small letters, text and dates in quotes; "
    "LIKE, && and so on are not known"
)
SHOWN_CHARS = 60
NUMBERS = 2**63


@dataclass(frozen=True, slots=True)
class Compares:
    """Whether the value of `column` compares as `sign` with `value`."""

    column: str
    sign: str
    value: Value


@dataclass(frozen=True, slots=True)
class IsOneOf:
    """Whether the value of `column` is one of `values`."""

    column: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Has:
    """Whether the list in `column` has `value`."""

    column: str
    value: Value


@dataclass(frozen=True, slots=True)
class IsNull:
    """Whether `column` has no value."""

    column: str


@dataclass(frozen=True, slots=True)
class IsTrue:
    """Whether the boolean `column` is true."""

    column: str


Test = Compares | IsOneOf | Has | IsNull | IsTrue


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite of `part`."""

    part: Condition


@dataclass(frozen=True, slots=True)
class Both:
    """Whether both parts hold."""

    first: Condition
    second: Condition


@dataclass(frozen=True, slots=True)
class Either:
    """Whether at least one of the parts holds."""

    first: Condition
    second: Condition


Condition = Test | Not | Both | Either


@lru_cache(256)
def parse_condition(text: str) -> Condition:
    """The condition that `text` says. ValueError, in one line, if it says none."""
    try:
        # In parentheses, so that it may be several lines.
        return _condition(ast.parse(f"({text}\n)", mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{_shown(text)} is no condition: {ADVICE}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"{_shown(text)} is nested too deeply") from error


def tests_of(condition: Condition) -> Iterator[Test]:
    """The tests that a condition is made of, in order."""
    if isinstance(condition, Not):
        yield from tests_of(condition.part)
    elif isinstance(condition, Both | Either):
        yield from tests_of(condition.first)
        yield from tests_of(condition.second)
    else:
        yield condition


def columns_of(condition: Condition) -> list[str]:
    """The columns that a condition uses, each once, in order of first use."""
    return list(dict.fromkeys(test.column for test in tests_of(condition)))


def _condition(node: ast.expr) -> Condition:
    if isinstance(node, ast.BoolOp):
        join = Both if isinstance(node.op, ast.And) else Either
        return reduce(join, map(_condition, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return Not(_condition(node.operand))
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        # 1 < stars < 4 says two things.
        pairs = zip(sides, node.ops, sides[1:], strict=False)
        return reduce(Both, [_test(node, *pair) for pair in pairs])
    column = _column(node)
    if column is None:
        raise ValueError(
            f"{_shown(node)} is no condition: compare a column with a value, as in stars < 3"
        )
    return IsTrue(column)


def _test(whole: ast.expr, left: ast.expr, sign: ast.cmpop, right: ast.expr) -> Condition:
    if isinstance(sign, ast.In | ast.NotIn):
        listed = _column(right) if _column(left) is None else None
        test: Test
        if listed is not None:
            test = Has(listed, _value(left))
        else:
            test = IsOneOf(_needed_column(whole, left), _values(right))
        return Not(test) if isinstance(sign, ast.NotIn) else test
    if isinstance(sign, ast.Is | ast.IsNot):
        if _column(right) is not None or _constant(right) is not None:
            raise ValueError(f"{_shown(whole)}: only null comes after `is`; write == for a value")
        test = IsNull(_needed_column(whole, left))
        return Not(test) if isinstance(sign, ast.IsNot) else test
    name = SIGNS[type(sign)]
    if _column(left) is None and _column(right) is not None:
        left, right, name = right, left, MIRRORED.get(name, name)
    if _column(right) is not None:
        raise ValueError(
            f"{_shown(whole)} compares two columns; one side must be a value, text in quotes"
        )
    return Compares(_needed_column(whole, left), name, _value(right))


def _column(node: ast.expr) -> str | None:
    """The column that `node` names; None if it names none."""
    if isinstance(node, ast.Name) and node.id not in CONSTANTS:
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column":
        match node.args, node.keywords:
            case [ast.Constant(value=str(name))], []:
                return _text(node, name)
    return None


def _needed_column(whole: ast.expr, node: ast.expr) -> str:
    column = _column(node)
    if column is None:
        raise ValueError(
            f"{_shown(whole)}: {_shown(node)} is no column; write its name, or column('its name')"
        )
    return column


def _values(node: ast.expr) -> tuple[Value, ...]:
    if not isinstance(node, ast.Tuple | ast.List | ast.Set) or not node.elts:
        raise ValueError(f"{_shown(node)}: a list of values comes after `in`, as in ('de', 'en')")
    return tuple(map(_value, node.elts))


def _value(node: ast.expr) -> Value:
    value = _constant(node)
    if value is None:
        raise ValueError(f"{_shown(node)} compares with nothing; write `is null` or `is not null`")
    return value


def _constant(node: ast.expr) -> Value | None:
    """The text, number or boolean that `node` spells out; None for null."""
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign, node = (-1 if isinstance(node.op, ast.USub) else 1), node.operand
        if isinstance(node, ast.Constant) and not _is_number(node.value):
            raise ValueError(f"{_shown(node)} has a sign but is no number")
    if not isinstance(node, ast.Constant) or not isinstance(node.value, Value | None):
        raise ValueError(
            f"{_shown(node)} is no value: write text and dates in quotes, a number or true"
        )
    value = node.value
    if isinstance(value, str):
        return _text(node, value)
    if value is None or not _is_number(value):
        return value
    if not math.isfinite(value) or (isinstance(value, int) and value >= NUMBERS):
        raise ValueError(f"{_shown(node)} is too large a number")
    return sign * value


def _text(node: ast.expr, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_shown(node)} is no text: it has half of a character") from error
    return text


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(part: ast.expr | str) -> str:
    text = " ".join((part if isinstance(part, str) else ast.unparse(part)).split())
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"
