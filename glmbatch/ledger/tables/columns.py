"""The columns that a table gets from its files: one type for each, over all of them.

Knows footers and folder names, no table's own log or metadata.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pyarrow as pa

from glmbatch.errors import InputError
from glmbatch.ledger.tables.types import (
    TableFormat,
    common_type,
    filled,
    open_schema,
    table_schema,
)
from glmbatch.store.inputs.found import Version, given_columns
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.parquet import open_parquet
from glmbatch.store.paths import Address
from glmbatch.store.tables.fitting import fitted_fields
from glmbatch.store.types import written_fields


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table. The last ones, `partitions`, are not in files but in folder names."""

    schema: pa.Schema
    partitions: list[str]


@dataclass(frozen=True, slots=True)
class Current:
    """A table as it is: its columns, the names of its files, its version. None without one."""

    columns: Columns | None
    files: frozenset[str]
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """A plan for the next version of a table. Unless it `grows`, its columns replace the old ones.

    `known` are the files of the current `version`, as names below the table's folder.
    """

    columns: Columns
    grows: bool
    known: frozenset[str]
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Added:
    """The columns in each file that a table gets, by name; `version` is that of the input."""

    schemas: Mapping[str, pa.Schema]
    version: Version | None


def fitted(
    form: TableFormat, where: str, table: Columns | None, added: Added, some_stay: bool
) -> tuple[Columns, bool]:
    """The columns of a `table` with the files that are `added`, and whether its own all stay.

    `some_stay`: some files of the table do. InputError, naming `where`, when they do not fit.
    """
    schemas = added.schemas
    partitions = _partition_columns(form, added)
    if table is not None and not schemas:
        partitions = table.partitions
    columns = pa.schema(
        [
            *_one_schema(form, schemas, form.advice),
            *(pa.field(name, pa.string()) for name in partitions),
        ]
    )
    if table is None:
        return Columns(_all_typed(columns), partitions), True
    advice = form.another
    if some_stay:
        advice = f"{advice} If files that stay differ from the others, too: {form.advice}"
    if schemas and table.partitions != partitions:
        raise InputError(
            f"{where}: its partition columns are {table.partitions}, those of this run "
            f"{partitions}. {advice}"
        )
    before = table_schema(form, where, table.schema)
    try:
        both = _one_schema(form, {"the table": before, "this run": columns}, advice)
        return Columns(_all_typed(both), partitions), True
    except InputError as error:
        if some_stay or form.grows:
            raise InputError(f"{where}: {error}") from error
        # No file stays, so the columns may change freely.
        return Columns(_all_typed(columns), partitions), False


def partition_values(name: str, columns: list[str]) -> dict[str, str | None]:
    """The values of the partition `columns` from the folders of the file `name`, by column."""
    folders = folder_columns(name)
    return {column: folders[column] for column in columns}


def schema_of(
    form: TableFormat, path: Address, differing: str = "", out: Collection[str] = ()
) -> pa.Schema:
    """The columns of the Parquet file `path` in the types of a table, untyped ones as they are.

    `differing` is what it has otherwise than the table that it comes from, and `out` are the
    columns that go out, or none if all do (see `Fragment`).
    """
    with open_parquet(path) as file:
        columns = fitted_fields(written_fields(file), differing)
        own = [field for field in columns if not out or field.name in out]
        return open_schema(form, str(path), pa.schema(own))


def _partition_columns(form: TableFormat, added: Added) -> list[str]:
    """The columns that come from folder names such as day=1 and are not in the files.

    InputError when they differ between files.
    """
    first: tuple[str, list[str]] | None = None
    for name, schema in added.schemas.items():
        given = given_columns(name, added.version)
        columns = [column for column in given if column not in schema.names]
        first = first or (name, columns)
        if columns != first[1]:
            raise InputError(
                f"{name}: its folders give the columns {columns}, those of {first[0]} give "
                f"{first[1]}, but {form.a_table} has one set. {form.advice}"
            )
    return first[1] if first else []


def _all_typed(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, filled(field.type)) for field in schema])


def _one_schema(form: TableFormat, schemas: Mapping[str, pa.Schema], advice: str) -> pa.Schema:
    """The columns of all files together; a file that lacks a column reads as null there.

    A column of type null in one file gets its type from the others. InputError when two files give
    a column different types, or when names differ only in case, which ends with `advice`.
    """
    kinds: dict[str, tuple[str, pa.DataType]] = {}
    folded: dict[str, str] = {}
    for name, schema in schemas.items():
        for field in schema:
            if (other := folded.setdefault(field.name.casefold(), field.name)) != field.name:
                raise InputError(
                    f"{name}: {form.a_table} cannot have both columns {field.name!r} and "
                    f"{other!r}: readers ignore case. {advice} Or leave one out with data.columns."
                )
            first, kind = kinds.get(field.name, (name, field.type))
            common = common_type(kind, field.type, grows=form.grows)
            if common is None:
                raise InputError(
                    f"{name}: column {field.name!r} has the type {field.type}, but {kind} in "
                    f"{first}; {form.a_table} has one type. {advice}"
                )
            # A message about another type names the file that gave the column its type.
            kinds[field.name] = (first if common == kind else name, common)
    return pa.schema([(name, kind) for name, (_, kind) in kinds.items()])
