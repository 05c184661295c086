"""Check a file's columns against the job's needs, including columns from folder names.

Readers treat a folder `day=1` as a column `day` of every file below it. Prompts do the same if the
file has no such column itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote, unquote_to_bytes

import pyarrow as pa

from glmbatch.errors import InputError, UnusableFile
from glmbatch.settings.conditions import parse_condition
from glmbatch.store.inputs.conditions import check_tests
from glmbatch.store.lines.form import is_lines
from glmbatch.store.lines.stored import OWN_FIELDS
from glmbatch.store.parquet import check_column
from glmbatch.store.values import is_turns

DELIMITERS = frozenset(",;|\t")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class NeededColumn:
    """A column that a job reads, and the setting that names it; `is_text` if it must be text.

    Its values must have a text of their own, unless it `is_tested` by a condition alone. If it
    `is_history`, they are lists of turns. `advice` goes with the message that it is missing.
    """

    name: str
    setting: str
    is_text: bool
    is_tested: bool = False
    is_history: bool = False
    advice: str = ""


@dataclass(frozen=True, slots=True)
class NeededTests:
    """The setting with a condition, its text, and the source columns by their names in it."""

    setting: str
    condition: str
    columns: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SchemaNeeds:
    """The columns that a job reads from each file, and those that it writes.

    `written` maps each column that the job writes to its step. `tests` are the conditions whose
    tests the columns must allow. `out` are the columns of a file that go out, besides those of its
    folders; None if all do.
    """

    read: tuple[NeededColumn, ...]
    written: Mapping[str, str]
    tests: tuple[NeededTests, ...] = ()
    out: tuple[str, ...] | None = None


def folder_columns(
    name: str | PurePosixPath, hidden: Collection[str] = ()
) -> dict[str, str | None]:
    """The columns that the folders of the file `name` give, with their values; None for null.

    Decodes %XX, with which Hive and Spark write characters that a folder name cannot have. Those of
    `hidden` are no columns, as a table says.
    """
    columns: dict[str, str | None] = {}
    for part in PurePosixPath(name).parts[:-1]:
        column, mark, value = part.partition("=")
        if mark and column:
            columns[unquote(column)] = None if value == NULL_PARTITION else _decoded(value)
    return {column: value for column, value in columns.items() if column not in hidden}


def folder_values(names: Iterable[str], hidden: Collection[str] = ()) -> dict[str, set[str | None]]:
    """The columns that the folders of the files `names` give, each with all of its values.

    `hidden` is as in `folder_columns`.
    """
    values: dict[str, set[str | None]] = {}
    # By folder, because a table may have 100,000 files in few.
    for name in {name.rpartition("/")[0]: name for name in names}.values():
        for column, value in folder_columns(name, hidden).items():
            values.setdefault(column, set()).add(value)
    return values


def _decoded(value: str) -> str:
    try:
        return unquote_to_bytes(value).decode()
    except UnicodeDecodeError:  # Spark reads each such byte as a character
        return unquote(value, "latin-1")


def from_folders(
    folders: Mapping[str, str | None], columns: Iterable[str], schema: pa.Schema
) -> tuple[tuple[str, str | None], ...]:
    """Those of `columns` that only the `folders` of a file give, not its `schema`.

    Pairs of name and value, sorted by name.
    """
    given = sorted({*columns} & folders.keys() - set(schema.names))
    return tuple((column, folders[column]) for column in given)


def check_schema(
    where: str,
    name: str,
    schema: pa.Schema,
    needs: SchemaNeeds,
    folders: Mapping[str, str | None],
) -> None:
    """UnusableFile unless a file with this schema has all columns to read and none to write.

    It is UnusableFile rather than InputError, because other files of the input may be usable.
    `folders` are the columns of the folders above the file `name`, with their values.
    """
    # Readers of the answers see names that are no columns of a table too.
    _refuse_taken(where, schema, needs, {*folders, *folder_columns(name)})
    given = folders.keys() - set(schema.names)
    try:
        for needed in needs.read:
            if needed.is_history:
                _check_history(where, name, schema, needed, folders)
            elif needed.name not in given:
                own, setting = in_file(name, schema, needed.name, needed.setting)
                check_column(
                    where,
                    own,
                    needed.name,
                    setting,
                    text=needed.is_text,
                    plain=not needed.is_tested,
                    folders=tuple(folders),
                    advice=needed.advice,
                )
        for tests in needs.tests:
            values, kinds = {}, {}
            for column_name, column in tests.columns.items():
                if column in given:
                    values[column_name] = folders[column]
                else:
                    kinds[column_name] = schema.field(column).type
            condition = parse_condition(tests.condition)
            check_tests(condition, kinds, (where, tests.setting), values)
    except InputError as error:
        raise UnusableFile(str(error)) from error


def _refuse_taken(
    where: str, schema: pa.Schema, needs: SchemaNeeds, folders: Iterable[str]
) -> None:
    """UnusableFile if a file or its `folders` have a column that the job writes."""
    # Readers treat a folder day=1 as a column, and some ignore the case of names.
    out = schema.names if needs.out is None else [*filter(needs.out.__contains__, schema.names)]
    taken = {column.casefold(): column for column in [*folders, *out]}
    for written, step in needs.written.items():
        column = taken.get(written.casefold())
        if column is not None:
            place = "" if column in schema.names else " in its folder's name"
            raise UnusableFile(
                f"{where}: already has a column {column!r}{place}, which step {step!r} would "
                "write. Rename the step."
            )


def in_file(name: str, schema: pa.Schema, column: str, setting: str) -> tuple[pa.Schema, str]:
    """What to say if the file `name` lacks `column`: the columns of its own, and what to set.

    A CSV file with a single column that has a delimiter in its name has another one than was set.
    """
    if not is_lines(name) or column in schema.names:
        return schema, setting
    own = pa.schema([field for field in schema if field not in OWN_FIELDS])
    (first, *others) = own.names or [""]
    is_csv = is_lines(name, "csv")
    if is_csv and not others and not DELIMITERS.isdisjoint(first):
        return own, "data.lines.delimiter"
    return own, setting


def _check_history(
    where: str,
    name: str,
    schema: pa.Schema,
    needed: NeededColumn,
    folders: Mapping[str, str | None],
) -> None:
    kind: pa.DataType = pa.string()  # a value from a folder's name
    if needed.name in schema.names or needed.name not in folders:
        columns = tuple(folders)
        own, setting = in_file(name, schema, needed.name, needed.setting)
        check_column(where, own, needed.name, setting, text=False, plain=False, folders=columns)
        kind = schema.field(needed.name).type
    if not is_turns(kind):
        raise InputError(
            f"{where}: column {needed.name!r} holds {kind}, not a list of turns: pairs of question "
            f"and answer, or structs of role and content. Set {needed.setting}."
        )
