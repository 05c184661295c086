"""The text of a condition becomes its tests. The only module that knows sqlglot."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, ClassVar

from sqlglot import exp, parser, tokens
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import SqlglotError

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
    Value,
)

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


def parse(text: str) -> Condition:
    """The condition that `text` says. ValueError, in one line, if it says none."""
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


def _condition(node: exp.Expr) -> Condition:
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
    if isinstance(node, exp.Column):
        return node.name.casefold() == NONE and not node.this.quoted
    return isinstance(node, exp.Null)


def _column(node: exp.Expr) -> str | None:
    """The column that `node` names; None if it names none."""
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
