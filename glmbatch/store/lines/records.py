"""Lines of text as records: their fields, or why a line has none. Nothing is left out but blanks.

All values are text, as it stands in the file, so no value depends on the lines around it.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from json.decoder import JSONDecodeError
from typing import NamedTuple

from glmbatch.errors import UnusableFile, counted, shown
from glmbatch.store.lines.form import Form
from glmbatch.store.lines.text import MOST_CHARS, Lines, TooLong, is_marked, unmarked

BLANKS = " \t\r\n"
# Numbers stay text: Python's own have limits.
_SCAN = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str).raw_decode
# What a message shows of a line.
SHOWN_CHARS = 80


class Record(NamedTuple):
    """One record: the number of its first line, from 1, and its fields by column.

    If it cannot be read, `error` says why, and `text` is the first of its lines as it stands.
    """

    line: int
    fields: dict[str, str | None]
    error: str | None = None
    text: str | None = None


def bad_line(line: int, reason: str, text: str) -> Record:
    """The record of a line that cannot be read."""
    text = unmarked(text.rstrip("\r\n"))
    begin = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
    return Record(line, {}, f"line {line}: {reason}: {shown(begin)}", text)


def records_of(lines: Lines, form: Form) -> Iterator[Record]:
    """The records of a file in order. UnusableFile if the header of a CSV file cannot be read."""
    return csv_records(lines, form) if form.kind == "csv" else json_records(lines)


def csv_header(lines: Lines, form: Form) -> list[str]:
    """The names of the columns; [] in an empty file.

    A column without a name is named by its place, as column_3. One of several columns of a name
    also has its place, as price_3, so that no job takes one for another.
    """
    first = next(_csv_rows(lines, form), None)
    if first is None:
        return []
    names, text = first
    if names is None or is_marked(text) or "\0" in text:
        raise UnusableFile(f"its header cannot be read: {shown(unmarked(text))[:SHOWN_CHARS]}")
    times = Counter(names)
    columns: list[str] = []
    for place, name in enumerate(names, 1):
        column = name if name and times[name] == 1 else f"{name or 'column'}_{place}"
        while column in columns or (column != name and column in times):
            column += "_"
        columns.append(column)
    return columns


def csv_records(lines: Lines, form: Form) -> Iterator[Record]:
    """The records after the header. If one cannot be read, only its first line is left out."""
    columns = csv_header(lines, form)
    for fields, text in _csv_rows(lines, form):
        if fields is None:
            yield bad_line(lines.number, "its quotes do not close", text)
        elif is_marked(text):
            yield bad_line(lines.number, "has bytes that are no characters", text)
        elif len(fields) != len(columns):
            reason = f"{counted(len(fields), 'field')} where the header has {len(columns)}"
            yield bad_line(lines.number, reason, text)
        else:
            yield Record(lines.number, dict(zip(columns, fields, strict=True)))


def _csv_rows(lines: Lines, form: Form) -> Iterator[tuple[list[str] | None, str]]:
    """The fields of each record, or None, and its text. `lines.number` is that of its first line.

    If quotes do not close as they should, only the first line is taken; the next may be sound.
    """
    # The limit is of the whole process. Fields may be as long as lines.
    csv.field_size_limit(2 * MOST_CHARS)
    while True:
        rows = csv.reader(lines, delimiter=form.delimiter, escapechar=form.escape, strict=True)
        lines.begin()
        try:
            for fields in rows:
                if fields:
                    yield fields, "".join(lines.taken)
                lines.begin()
            return
        except (csv.Error, TooLong):
            yield None, lines.taken[0]
            lines.put_back()


def json_records(lines: Lines) -> Iterator[Record]:
    """A record for each line that is not blank, by itself."""
    for line in lines:
        if line.strip(BLANKS):
            yield json_record(lines.number, line)
        lines.begin()


def json_record(number: int, line: str) -> Record:
    """The record of one line: an object, of which each key is a column."""
    if is_marked(line):
        return bad_line(number, "has bytes that are no characters", line)
    try:
        pairs = json_fields(line)
    except JSONDecodeError as error:
        return bad_line(number, f"is not JSON at character {error.pos + 1}: {error.msg}", line)
    except RecursionError:
        return bad_line(number, "is JSON of too many levels", line)
    except ValueError as error:
        return bad_line(number, str(error), line)
    return Record(number, pairs)


def json_fields(line: str) -> dict[str, str | None]:
    """The keys of the object in `line`, and their values: a text, None for null, else as it stands.

    ValueError if it is no object, or a key or text in it cannot be a column's.
    """
    place = _after_blanks(line, 0)
    if line[place] != "{":
        _end(line, _value(line, place)[1])
        raise ValueError("is JSON, but no object in braces")
    fields: dict[str, str | None] = {}
    place = _after_blanks(line, place + 1)
    if line[place : place + 1] == "}":
        _end(line, place + 1)
        return fields
    while True:
        if line[place : place + 1] != '"':
            raise JSONDecodeError("Expecting a name in double quotes", line, place)
        key, place = _SCAN(line, place)
        place = _after_blanks(line, place)
        if line[place : place + 1] != ":":
            raise JSONDecodeError("Expecting ':' delimiter", line, place)
        value, place = _value(line, _after_blanks(line, place + 1))
        _check(key, value, fields)
        fields[key] = value
        place = _after_blanks(line, place)
        mark = line[place : place + 1]
        if mark == "}":
            _end(line, place + 1)
            return fields
        if mark != ",":
            raise JSONDecodeError("Expecting ',' delimiter", line, place)
        place = _after_blanks(line, place + 1)


def _value(line: str, place: int) -> tuple[str | None, int]:
    """The value that begins at `place`, as text, and the place after it."""
    value, end = _SCAN(line, place)
    if value is None or (isinstance(value, str) and line[place] == '"'):
        return value, end
    return line[place:end], end


def _check(key: str, value: str | None, fields: Sequence[str] | dict[str, str | None]) -> None:
    """ValueError if `key` and `value` cannot be a column and its text."""
    if not key:
        raise ValueError("has a key without characters")
    if key in fields:
        raise ValueError(f"has the key {shown(key)!r} twice")
    # Half of a surrogate pair, which JSON can write but no text has.
    if is_marked(key) or (value is not None and is_marked(value)):
        raise ValueError(f"has half of a character in {shown(unmarked(key))!r}")


def _after_blanks(line: str, place: int) -> int:
    while line[place : place + 1] in BLANKS and place < len(line):
        place += 1
    return place


def _end(line: str, place: int) -> None:
    place = _after_blanks(line, place)
    if place < len(line):
        raise JSONDecodeError("Extra data", line, place)
