"""What a job asks of a file's columns, its own and those that its folders' names give.

Readers take a folder `day=1` for a column `day` of every file below it. So do prompts, where the
file has no such column itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote, unquote_to_bytes

import pyarrow as pa

from glmbatch.errors import InputError, UnusableFile, shown
from glmbatch.store.parquet import check_column
from glmbatch.store.paths import AnyPath

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class NeededColumn:
    """A column that a job reads, and the setting that names it; `is_text` if it must hold text."""

    name: str
    setting: str
    is_text: bool


@dataclass(frozen=True, slots=True)
class SchemaNeeds:
    """What a job asks of each file's schema.

    `read` are the columns it reads, `written` the step of each column that it writes.
    """

    read: tuple[NeededColumn, ...]
    written: Mapping[str, str]


def folder_columns(name: str | PurePosixPath) -> dict[str, str | None]:
    """The columns that the folders of the file `name` give it, with their value, None for null.

    Hive and Spark write what a folder's name cannot hold as %XX.
    """
    columns: dict[str, str | None] = {}
    for part in PurePosixPath(name).parts[:-1]:
        column, mark, value = part.partition("=")
        if mark and column:
            columns[unquote(column)] = None if value == NULL_PARTITION else _decoded(value)
    return columns


def _decoded(value: str) -> str:
    try:
        return unquote_to_bytes(value).decode()
    except UnicodeDecodeError:  # Spark takes each such byte for a character
        return unquote(value, "latin-1")


def from_folders(
    name: str, columns: Iterable[str], schema: pa.Schema
) -> tuple[tuple[str, str | None], ...]:
    """Those of `columns` that the file `name` has from its folders, as its `schema` lacks them."""
    folders = folder_columns(name)
    given = sorted({*columns} & folders.keys() - set(schema.names))
    return tuple((column, folders[column]) for column in given)


def check_schema(path: AnyPath, name: str, schema: pa.Schema, needs: SchemaNeeds) -> None:
    """UnusableFile unless the job's prompts and answers fit a file of this schema.

    Other files may fit, so it stops no run that allows for some that do not.
    """
    folders = folder_columns(name)
    # Readers take a folder day=1 for a column, and do not tell Mood from mood.
    taken = {column.casefold(): column for column in [*folders, *schema.names]}
    for written, step in needs.written.items():
        column = taken.get(written.casefold())
        if column is not None:
            where = "" if column in schema.names else " in its folder's name"
            raise UnusableFile(
                f"{shown(path)}: already has a column {column!r}{where}, which step {step!r} would "
                "write. Rename the step."
            )
    given = folders.keys() - set(schema.names)
    try:
        for needed in needs.read:
            if needed.name not in given:
                check_column(
                    shown(path),
                    schema,
                    needed.name,
                    needed.setting,
                    text=needed.is_text,
                    folders=tuple(folders),
                )
    except InputError as error:
        raise UnusableFile(str(error)) from error
