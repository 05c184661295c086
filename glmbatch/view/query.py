"""What a viewer asks for: which rows and in which order, as SQL over the published files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

from pydantic import BaseModel, Field

from glmbatch.settings.columns import Columns
from glmbatch.view.published import ViewedStep

Order = Literal["worth", "unsure", "differs", "grown", "random", "file"]

# Columns beside those of the files. Published files have no such names.
FILE = "[file]"
ROW = "file_row_number"
# Of equally sure rows, any: by file they would all be of one day.
CHANCE = "hash({key}, 'chance')"


class Filters(BaseModel, frozen=True, extra="forbid"):
    """Which rows to show, judged by one step."""

    step: str
    order: Order = "worth"
    label: str | None = None
    error: str | None = Field(None, description="an error type, or any or none")
    least: float | None = Field(None, description="lowest score")
    most: float | None = Field(None, description="highest score")
    file: str | None = Field(None, description="part of a file's name")
    text: str | None = Field(None, description="part of the row's text or answer")
    state: Literal["open", "corrected", "all"] = "open"
    differs: bool = False


class Clause(BaseModel, frozen=True):
    """A piece of SQL and the values of its parameters."""

    sql: str
    values: tuple[Any, ...] = ()


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text in SQL, where no parameter may stand."""
    return "'" + text.replace("'", "''") + "'"


def sureness(step: ViewedStep) -> str:
    """How sure the model is of a row, as SQL: from 0 to 1, null where nothing says it."""
    names = Columns(step.name)
    if step.kind in ("label", "labels"):
        return quoted(names.margin)
    parts = []
    for columns in (names, *map(names.field, step.fields)):
        if columns.mean_log_prob in step.columns:
            parts.append(f"exp({quoted(columns.mean_log_prob)})")
        elif columns.score in step.columns:
            parts.append(quoted(columns.score))
    return f"least({', '.join(parts)})" if parts else "NULL::DOUBLE"


def score(step: ViewedStep) -> str:
    """The number that a viewer filters by, as SQL."""
    if step.kind in ("label", "labels"):
        return quoted(Columns(step.name).score)
    return sureness(step)


def where(
    filters: Filters,
    step: ViewedStep,
    text_column: str | None,
    corrected: Sequence[bytes],
    folder_chars: int,
) -> Clause:
    """The rows that meet `filters`; `corrected` are the keys of those that a person looked at.

    Paths of files begin with `folder_chars` characters before their name.
    """
    columns = Columns(step.name)
    answer, key = quoted(step.name), quoted(columns.key)
    parts: list[tuple[str, list[Any]]] = []
    if filters.label is not None:
        is_one = f"{answer} = ?" if step.kind == "label" else f"list_contains({answer}, ?)"
        parts.append((is_one, [filters.label]))
    if filters.error is not None:
        parts.append(_error(columns, filters.error))
    if filters.least is not None:
        parts.append((f"{score(step)} >= ?", [filters.least]))
    if filters.most is not None:
        parts.append((f"{score(step)} <= ?", [filters.most]))
    if filters.file:
        parts.append((f"contains(substr({quoted(FILE)}, ?), ?)", [folder_chars + 1, filters.file]))
    if filters.text:
        searched = [quoted(text_column)] if text_column is not None else []
        searched += [f"{answer}::VARCHAR"] if step.kind in ("text", "fields") else []
        tests = [f"contains(lower({column}), lower(?))" for column in searched]
        parts.append((f"({' OR '.join(tests) or 'true'})", [filters.text] * len(tests)))
    if filters.state != "all":
        is_corrected = f"coalesce({key} IN (SELECT unnest(?::BLOB[])), false)"
        negated = "NOT " if filters.state == "open" else ""
        parts.append((f"{negated}{is_corrected}", [list(corrected)]))
    if filters.differs:
        parts.append((f"{differs(step)} IS NOT NULL", []))
    values = tuple(chain.from_iterable(given for _, given in parts))
    return Clause(sql=" AND ".join(sql for sql, _ in parts) or "true", values=values)


def _error(columns: Columns, error: str) -> tuple[str, list[Any]]:
    if error == "any":
        return f"{quoted(columns.error)} IS NOT NULL", []
    if error == "none":
        return f"{quoted(columns.error_type)} IS NULL", []
    return f"{quoted(columns.error_type)} = ?", [error]


def differing(step: ViewedStep) -> str:
    """The table of the rows on which two outputs differ in `step`."""
    return quoted(f"differs in {step.name}")


def differs(step: ViewedStep) -> str:
    """The column that is null unless two outputs differ in `step`."""
    return f"{differing(step)}.other_row"


def ranking(order: Order, step: ViewedStep, *, compared: bool) -> Clause:
    """What to sort by, as SQL; the lowest come first, and null last.

    The worth of a look: a row's distance from the next label; 1 less if another output
    disagrees, and less by what its label's share has grown since the run before.
    """
    sure = f"coalesce({sureness(step)}, 1)"
    grown = _grown(step)
    disagrees = f"({differs(step)} IS NOT NULL)::INT" if compared else "0"
    if order == "unsure":
        return Clause(sql=sureness(step))
    if order == "differs":
        return Clause(sql=f"{sure} - 2 * {disagrees}")
    if order == "grown":
        return Clause(
            sql=f"{sure} - 2 * ({grown.sql} > 0)::INT - {grown.sql}", values=grown.values * 2
        )
    if order == "random":
        return Clause(sql=f"({quoted(Columns(step.name).key)} IS NULL)::INT")  # nothing to correct
    return Clause(sql=f"{sure} - {disagrees} - {grown.sql}", values=grown.values)


def _grown(step: ViewedStep) -> Clause:
    if step.kind != "label" or not step.grown:
        return Clause(sql="0")
    cases = ["WHEN ? THEN ?"] * len(step.grown)
    values = tuple(chain.from_iterable(step.grown.items()))
    return Clause(sql=f"(CASE {quoted(step.name)} {' '.join(cases)} ELSE 0 END)", values=values)
