"""Examples in a step's prompt: read from where the settings say, and checked against the step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from glmbatch.errors import SHOWN_CHARS, InputError, UnusableFile, shown, some_of
from glmbatch.glm.form import is_value
from glmbatch.settings.job import TEXT, AnyStep, ClassifyStep, ExtractStep, placeholders
from glmbatch.settings.steps.fields import ExtractField
from glmbatch.settings.steps.step import ANSWER, MOST_EXAMPLES, Examples, object_text
from glmbatch.steps.classify import scored_texts
from glmbatch.store.parquet import open_parquet
from glmbatch.store.values import is_plain, prompt_values


def with_examples(step: AnyStep, text_column: str) -> AnyStep:
    """`step` with all its examples as rows, each with a value for every placeholder and an answer.

    In a file, the column of a placeholder has its name, or that of the text column. InputError when
    a value is missing, or an answer is not one that the step could give.
    """
    if step.examples is None:
        return step
    needed = [*placeholders(step.prompt_template), ANSWER]
    rows = []
    if step.examples.file is not None:
        where = step.examples.file
        named = enumerate(_read(where, needed, text_column))
    else:
        where = f"step {step.name!r}, examples"
        named = enumerate(dict(row) for row in step.examples.rows)
    for number, row in named:
        try:
            rows.append(_checked(step, row, needed))
        except ValueError as error:
            raise InputError(f"{where}: example {number} {error}. Set examples.") from error
    return step.model_copy(update={"examples": Examples(rows=rows)})


def _read(file: str, needed: list[str], text_column: str) -> Iterator[dict[str, str | None]]:
    try:
        with open_parquet(file) as opened:
            if not 0 < opened.metadata.num_rows <= MOST_EXAMPLES:
                raise InputError(
                    f"{file}: has {opened.metadata.num_rows:,} rows; a prompt takes from 1 to "
                    f"{MOST_EXAMPLES} examples. Set examples."
                )
            table = opened.read()
    except (UnusableFile, OSError) as error:
        raise InputError(f"{error} Set examples.") from error
    columns: dict[str, Sequence[object]] = {}
    for name in needed:
        column = name
        if name == TEXT and name not in table.column_names and text_column != ANSWER:
            column = text_column
        is_usable = table.column_names.count(column) == 1
        if is_usable and name == ANSWER and pa.types.is_struct(table.column(column).type):
            # The fields of an extraction.
            columns[name] = [object_text(value) for value in table.column(column).to_pylist()]
            continue
        if not is_usable or not is_plain(table.column(column).type):
            raise InputError(
                f"{file}: has no plain column {column!r}; it has "
                f"{some_of(table.column_names, column)}. Set examples."
            )
        columns[name] = prompt_values(table.column(column))
    for number in range(len(table)):
        row = {}
        for name, values in columns.items():
            value = values[number]
            row[name] = value if isinstance(value, str) else None
        yield row


def _checked(step: AnyStep, row: dict[str, str | None], needed: list[str]) -> dict[str, str]:
    """The needed values of an example. ValueError, as the end of a sentence, when it has not all.

    The answer of an extract step is spelled as the model would.
    """
    unknown = sorted(row.keys() - set(needed))
    if unknown:
        raise ValueError(f"has {some_of(unknown)}, which the prompt does not use")
    values: dict[str, str] = {}
    for name in needed:
        value = row.get(name)
        if value is None or not value.strip():
            raise ValueError(f"has no {name!r}")
        values[name] = value
    answer = values[ANSWER]
    texts = scored_texts(step) if isinstance(step, ClassifyStep) else []
    if texts and answer not in texts:
        raise ValueError(f"has the answer {answer!r}, which is none of {some_of(texts)}")
    if isinstance(step, ExtractStep):
        values[ANSWER] = _as_written(answer, step.fields)
    return values


def _as_written(answer: str, fields: Sequence[ExtractField]) -> str:
    try:
        value = json.loads(answer)
    except ValueError as error:
        raise ValueError("has an answer that is no JSON") from error
    names = [field.name for field in fields]
    if not isinstance(value, dict) or {*value} != {*names}:
        raise ValueError(f"has an answer that is no object of the fields {some_of(names)}")
    parts = []
    for field in fields:
        text = _as_json(value[field.name])
        if not is_value(json.dumps(field.json_schema()), text):
            given = shown(text)[:SHOWN_CHARS]
            raise ValueError(f"has {given} for {field.name!r}, which is no value of that field")
        parts.append(f"{_as_json(field.name)}: {text}")
    return f"{{{', '.join(parts)}}}"


def _as_json(value: Any) -> str:
    """A value as JSON text without exponents, which no field allows."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_json, value))}]"
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    return json.dumps(value, ensure_ascii=False)
