"""Conditions on a row, such as `stars < 3 and language in ('de', 'en')`. Parsed, never executed.

They are written as after SQL's `where`, and sqlglot parses them. Only these forms are accepted: a
column by its name or as column('any name'), compared with one value or several, searched for a
value if it is a list, tested for null or, if it is a boolean, alone; and such tests joined by
`and`, `or` and `not`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from sqlglot import exp

Value = str | int | float | bool

# The signs of sqlglot's comparisons, by the names of their classes.
SIGNS = {"LT": "<", "LTE": "<=", "GT": ">", "GTE": ">=", "EQ": "==", "NEQ": "!="}
# The sign that says the same with the sides exchanged.
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
# The words and signs that mean something; every other word is a column, as `order` is.
WORDS = ("AND", "OR", "NOT", "IN", "IS", "NULL", "TRUE", "FALSE", "BETWEEN", "LIKE")
SQL_SIGNS = ("==", "<>", "!=", "<=", ">=")
# Python's word for null; a column of such a name is column('none').
NONE = "none"
ADVICE = (
    "compare with = or <, join with `and`, `or` and `not`, and write text and dates in quotes; "
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
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    try:
        tree = exp.maybe_parse(text, into=exp.Condition, dialect=_dialect())
        return _condition(tree)
    except SqlglotError as error:
        raise ValueError(f"{_shown(text)} is no condition: {ADVICE}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"{_shown(text)} is nested too deeply") from error


@cache
def _dialect() -> Any:
    """SQL in which text may have either quotes, and which has no word but WORDS."""
    from sqlglot import parser, tokens
    from sqlglot.dialects.dialect import Dialect

    words = {*WORDS, *SQL_SIGNS}
    own = {word: kind for word, kind in tokens.Tokenizer.KEYWORDS.items() if word in words}

    class Conditions(Dialect):
        class Tokenizer(tokens.Tokenizer):
            QUOTES: ClassVar = ["'", '"']
            IDENTIFIERS: ClassVar = ["`"]
            COMMENTS: ClassVar = []
            KEYWORDS: ClassVar = own

        class Parser(parser.Parser):
            FUNCTIONS: ClassVar = {}
            FUNCTION_PARSERS: ClassVar = {}
            NO_PAREN_FUNCTION_PARSERS: ClassVar = {}

    return Conditions


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


def text_of(condition: Condition) -> str:
    """A text that `parse_condition` reads as `condition`, the same for equal ones."""
    if isinstance(condition, Not):
        return f"not ({text_of(condition.part)})"
    if isinstance(condition, Both | Either):
        join = "and" if isinstance(condition, Both) else "or"
        return f"({text_of(condition.first)} {join} {text_of(condition.second)})"
    column = f"column({_quoted(condition.column)})"
    if isinstance(condition, Compares):
        return f"{column} {condition.sign} {_spelled(condition.value)}"
    if isinstance(condition, IsOneOf):
        return f"{column} in ({', '.join(map(_spelled, condition.values))})"
    if isinstance(condition, Has):
        return f"{_spelled(condition.value)} in {column}"
    return f"{column} is null" if isinstance(condition, IsNull) else column


def _spelled(value: Value) -> str:
    return _quoted(value) if isinstance(value, str) else repr(value).lower()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _condition(node: exp.Expr) -> Condition:
    from sqlglot import exp

    if isinstance(node, exp.Paren):
        return _condition(node.this)
    if isinstance(node, exp.And | exp.Or):
        join = Both if isinstance(node, exp.And) else Either
        return _joined(join, list(map(_condition, node.flatten(unnest=False))))
    if isinstance(node, exp.Not):
        return Not(_condition(node.this))
    test = _test(node)
    if test is None:
        raise ValueError(
            f"{_shown(node)} is no condition: compare a column with a value, as in stars < 3"
        )
    return test


def _joined(join: type[Both | Either], parts: list[Condition]) -> Condition:
    """The parts as a tree that is not deep, however many they are."""
    if len(parts) == 1:
        return parts[0]
    middle = (len(parts) + 1) // 2
    return join(_joined(join, parts[:middle]), _joined(join, parts[middle:]))


def _test(node: exp.Expr) -> Condition | None:
    from sqlglot import exp

    if isinstance(node, exp.In):
        return _searched(node)
    if isinstance(node, exp.Between):
        column = _needed_column(node, node.this)
        least, most = _value(node.args["low"]), _value(node.args["high"])
        return Both(Compares(column, ">=", least), Compares(column, "<=", most))
    if isinstance(node, exp.Is):
        if not _is_null(node.expression):
            raise ValueError(f"{_shown(node)}: only null comes after `is`; write = for a value")
        return IsNull(_needed_column(node, node.this))
    name = SIGNS.get(type(node).__name__)
    if name is None:
        alone = _column(node)
        return None if alone is None else IsTrue(alone)
    left, right = node.this, node.expression
    if type(left).__name__ in SIGNS:  # 1 < stars < 4 says two things
        return Both(_condition(left), _compared(node, left.expression, name, right))
    return _compared(node, left, name, right)


def _compared(whole: exp.Expr, left: exp.Expr, name: str, right: exp.Expr) -> Condition:
    if _column(left) is None and _column(right) is not None:
        left, right, name = right, left, MIRRORED.get(name, name)
    if _column(right) is not None:
        raise ValueError(
            f"{_shown(whole)} compares two columns; one side must be a value, text in quotes"
        )
    return Compares(_needed_column(whole, left), name, _value(right))


def _searched(node: exp.In) -> Condition:
    from sqlglot import exp

    field = node.args.get("field")
    listed = None if field is None or _column(node.this) is not None else _column(field)
    if listed is not None:
        return Has(listed, _value(node.this))
    column = _needed_column(node, node.this)
    values = node.expressions
    if isinstance(field, exp.Struct | exp.Array | exp.Tuple):
        values = field.expressions
    if not values:
        raise ValueError(f"{_shown(node)}: a list of values comes after `in`, as in ('de', 'en')")
    return IsOneOf(column, tuple(map(_value, values)))


def _is_null(node: exp.Expr) -> bool:
    from sqlglot import exp

    if isinstance(node, exp.Column):
        return node.name.casefold() == NONE and not node.this.quoted
    return isinstance(node, exp.Null)


def _column(node: exp.Expr) -> str | None:
    """The column that `node` names; None if it names none."""
    from sqlglot import exp

    if isinstance(node, exp.Column) and not node.table and not _is_null(node):
        return _text(node, node.name)
    if isinstance(node, exp.Anonymous) and node.name == "column" and len(node.expressions) == 1:
        name = node.expressions[0]
        if isinstance(name, exp.Literal) and name.is_string:
            return _text(node, name.name)
    return None


def _needed_column(whole: exp.Expr, node: exp.Expr) -> str:
    column = _column(node)
    if column is None:
        raise ValueError(
            f"{_shown(whole)}: {_shown(node)} is no column; write its name, or column('its name')"
        )
    return column


def _value(node: exp.Expr) -> Value:
    """The text, number or boolean that `node` spells out."""
    from sqlglot import exp

    if _is_null(node):
        raise ValueError(f"{_shown(node)} compares with nothing; write `is null` or `is not null`")
    if isinstance(node, exp.Boolean):
        return bool(node.this)
    if isinstance(node, exp.Literal) and node.is_string:
        return _text(node, node.name)
    sign = 1
    number = node
    if isinstance(node, exp.Neg):
        sign, number = -1, node.this
    if not isinstance(number, exp.Literal) or number.is_string:
        raise ValueError(
            f"{_shown(node)} is no value: write text and dates in quotes, a number or true"
        )
    value = _number(node, number.name)
    return sign * value


def _number(node: exp.Expr, digits: str) -> int | float:
    try:
        value: int | float = int(digits) if digits.isdecimal() else float(digits)
    except ValueError as error:
        raise ValueError(f"{_shown(node)} is no number") from error
    if not math.isfinite(value) or (isinstance(value, int) and value >= NUMBERS):
        raise ValueError(f"{_shown(node)} is too large a number")
    return value


def _text(node: exp.Expr, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_shown(node)} is no text: it has half of a character") from error
    return text


def _shown(part: exp.Expr | str) -> str:
    text = part if isinstance(part, str) else part.sql()
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"
