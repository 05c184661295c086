"""Conditions on a row, such as `stars < 3 and language in ('de', 'en')`. Parsed, never executed.

They are written as after SQL's `where`. Only these forms are accepted: a column by its name or as
column('any name'), compared with one value or several, searched for a value if it is a list, tested
for null or, if it is a boolean, alone; and such tests joined by `and`, `or` and `not`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

Value = str | int | float | bool


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
    # Imports sqlglot, which most commands do without.
    from glmbatch.settings.conditions.parsing import parse

    return parse(text)


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
