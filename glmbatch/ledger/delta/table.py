"""A Delta Lake table over published files: its readers see a publication completely or not at all.

The table is a log, OUTPUT/_delta_log, that names the Parquet files of each version. Files of
earlier versions stay for their readers until Delta's own `vacuum` deletes them. Uses the library
deltalake. Knows no jobs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import pyarrow as pa

from glmbatch.errors import MACHINE_ERRNOS, GlmbatchError, InputError, TransientError
from glmbatch.ledger.delta.types import HINT, delta_schema, filled, joined, open_schema, typed_text
from glmbatch.store.errors import one_line
from glmbatch.store.files import exists, sync, writable
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.parquet import open_parquet
from glmbatch.store.paths import Address, AnyPath
from glmbatch.store.types import written_fields

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake.transaction import AddAction, RemoveAction

LOG = "_delta_log"
APPLICATION = "glmbatch"  # the application id of our transactions in the log


def check_sources(
    output: Address, sources: Mapping[str, Address], staying: Sequence[str]
) -> dict[str, str]:
    """Check that the Parquet files `sources` (name to path) can be in one table in `output`.

    Returns for each source the types that other files give to its columns without one, as
    `typed_text`. The files `staying`, by name, stay in the table beside them. InputError when the
    columns do not match, when the table is not ours, or when deltalake is not installed.
    """
    try:
        import deltalake  # noqa: F401
    except ImportError as error:
        raise InputError(
            "data.format is delta, but deltalake is not installed. Run pip install "
            "'glmbatch[delta]'."
        ) from error
    root = _local(output)
    with _delta_errors(root):
        table = _open(root)
        if table is not None and table.transaction_version(APPLICATION) is None:
            raise InputError(
                f"{root}: is a Delta table that glmbatch did not write. Set data.output."
            )
        # The table has the columns of its files, so their footers are not read.
        others = set(staying) - _live_files(table)
        files = {**sources, **{name: root / name for name in others}}
        schemas = {name: _schema_of(path) for name, path in files.items() if exists(path)}
        columns, _, _ = _fit(root, table, schemas, bool(staying))
        return {name: typed_text(schemas[name], columns) for name in sources if name in schemas}


@dataclass(frozen=True, slots=True)
class Commit:
    """A plan for the next version of a table: its columns, and whether they replace the old ones.

    `known` are the files of the current version, as names below the table's folder.
    """

    columns: pa.Schema
    partitions: list[str]
    mode: Literal["overwrite", "append"]
    known: frozenset[str]


def _local(root: Address) -> Path:
    local = Folder(root).local
    if local is not None:
        return local
    raise InputError(
        f"{root}: a Delta table can be written only to a local folder. Set data.format to parquet, "
        "or data.output."
    )


def plan_commit(root: AnyPath, files: Mapping[str, AnyPath]) -> Commit:
    """Plan the version of the table in `root` that has exactly `files`; writes nothing.

    `files` maps names below `root` to the current paths. InputError when one table cannot hold them
    all.
    """
    root = _local(root)
    with _delta_errors(root):
        table = _open(root)
        known = _live_files(table)
        # The table has the columns of its files, so only the footers of new ones are read.
        schemas = {name: _schema_of(path) for name, path in files.items() if name not in known}
        columns, partitions, grows = _fit(root, table, schemas, bool(known & files.keys()))
        return Commit(columns, partitions, "append" if grows else "overwrite", frozenset(known))


def commit_table(root: AnyPath, rows: Mapping[str, int], commit: Commit) -> None:
    """Commit a version of the table in `root` with exactly the files in `rows`.

    `rows` maps file names to numbers of rows. Safe to repeat: a table that has just these files is
    not committed again. The commit is on disk when this returns. TransientError when another commit
    came between, InputError when the table cannot be used.
    """
    from deltalake import CommitProperties, Schema, Transaction
    from deltalake.transaction import create_table_with_add_actions

    if commit.known == set(rows):
        return
    root = _local(root)
    with _delta_errors(root), writable(root / LOG):
        table = _open(root)
        version = table.transaction_version(APPLICATION) if table is not None else None
        # Other tools can tell from it how many publications there were.
        transaction = Transaction(APPLICATION, (version or 0) + 1, int(time.time() * 1000))
        properties = CommitProperties(app_transactions=[transaction])
        schema = Schema.from_arrow(commit.columns)
        adds = _adds(root, rows, commit)
        if table is None:
            create_table_with_add_actions(
                str(root),
                schema,
                adds,
                partition_by=commit.partitions,
                commit_properties=properties,
            )
        else:
            _grow(table, commit)
            # An overwrite removes all other files on its own.
            removes = _removes(rows, commit) if commit.mode == "append" else []
            table.create_write_transaction(
                [*removes, *adds],
                commit.mode,
                schema,
                commit.partitions,
                commit_properties=properties,
            )
        # The last two entries: a new column is added in a commit of its own before the files.
        for path in (*sorted((root / LOG).glob("*.json"))[-2:], root / LOG, root):
            sync(path)


def _adds(root: Path, rows: Mapping[str, int], commit: Commit) -> list[AddAction]:
    """The log's entries for files that are not in the current version."""
    from deltalake.transaction import AddAction

    milliseconds = int(time.time() * 1000)
    adds = []
    for name in rows:
        if name in commit.known:
            continue
        size_bytes = (root / name).stat().st_size
        statistics = json.dumps({"numRecords": rows[name]})
        values = partition_values(name, commit.partitions)
        adds.append(AddAction(name, size_bytes, values, milliseconds, True, statistics))
    return adds


def _removes(rows: Mapping[str, int], commit: Commit) -> list[RemoveAction]:
    """The log's entries for files of the current version that are not in the next one."""
    from deltalake.transaction import RemoveAction

    milliseconds = int(time.time() * 1000)
    removes = []
    for name in sorted(commit.known - set(rows)):
        values = partition_values(name, commit.partitions)
        removes.append(RemoveAction(name, True, milliseconds, None, values))
    return removes


def _grow(table: DeltaTable, commit: Commit) -> None:
    """Add the columns that the table lacks, and the reader features that its types need."""
    from deltalake import Schema, TableFeatures

    table_schema = pa.schema(table.schema().to_arrow())
    new = pa.schema([field for field in commit.columns if field.name not in table_schema.names])
    if commit.mode == "append":
        if len(new):
            table.alter.add_columns(Schema.from_arrow(new).fields)
    elif "timestamp_ntz" in Schema.from_arrow(commit.columns).to_json():
        table.alter.add_feature(
            TableFeatures.TimestampWithoutTimezone, allow_protocol_versions_increase=True
        )


def table_files(root: AnyPath) -> set[str]:
    """The names below `root` of the files in the table's current version; none without a table."""
    with _delta_errors(_local(root)):
        return _live_files(_open(_local(root)))


def _live_files(table: DeltaTable | None) -> set[str]:
    if table is None:
        return set()
    return {
        unquote(path)
        for path in pa.table(table.get_add_actions(flatten=True)).column("path").to_pylist()
    }


def is_table(root: Address) -> bool:
    """Whether a Delta table was ever committed in `root`."""
    # A commit's name is its number in 20 digits. With a prefix, a store looks for nothing else.
    return any((Folder(root) / LOG).glob("0*.json"))


def _open(root: Path) -> DeltaTable | None:
    from deltalake import DeltaTable

    return DeltaTable(root) if is_table(root) else None


@contextmanager
def _delta_errors(root: Path) -> Iterator[None]:
    """Turn errors of deltalake into ours. A conflict with another commit is transient."""
    try:
        yield
    except GlmbatchError:
        raise
    except Exception as error:  # deltalake also raises bare Exception
        # Some of its errors include a backtrace, which begins with " 0: ".
        reason = one_line(error, limit=300).partition(" 0: ")[0]
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{root}: cannot be read now: {error.strerror}.") from error
        if "conflict" in type(error).__name__.lower() or "conflict" in reason.lower():
            raise TransientError(f"{root}: another commit came between: {reason}") from error
        raise InputError(
            f"{root}: the Delta table cannot be used: {reason}. Move its {LOG} away, and the next "
            "run starts a new history with all rows; or set data.output."
        ) from error


def _fit(
    root: Path, table: DeltaTable | None, schemas: Mapping[str, pa.Schema], some_stay: bool
) -> tuple[pa.Schema, list[str], bool]:
    """The table's columns and partition columns with these files, and whether old ones all stay."""
    partitions = _partition_columns(schemas)
    if table is not None and not schemas:
        partitions = table.metadata().partition_columns
    columns = pa.schema(
        [*_one_schema(schemas), *(pa.field(name, pa.string()) for name in partitions)]
    )
    if table is None:
        return _all_typed(columns), partitions, True
    if schemas and table.metadata().partition_columns != partitions:
        raise InputError(
            f"{root}: its partition columns are {table.metadata().partition_columns}, those of "
            f"this run {partitions}. Set data.output."
        )
    table_schema = delta_schema(str(root), pa.schema(table.schema().to_arrow()))
    try:
        both = _one_schema({"the table": table_schema, "this run": columns})
        return _all_typed(both), partitions, True
    except InputError as error:
        if some_stay:
            raise InputError(f"{root}: {error}") from error
        # No file stays, so the columns may change freely.
        return _all_typed(columns), partitions, False


def partition_values(name: str, columns: list[str]) -> dict[str, str | None]:
    """The values of the partition `columns` from the folders of the file `name`, by column."""
    folders = folder_columns(name)
    return {column: folders[column] for column in columns}


def _partition_columns(schemas: Mapping[str, pa.Schema]) -> list[str]:
    """The columns that come from folder names such as day=1 and are not in the files.

    InputError when they differ between files.
    """
    first: tuple[str, list[str]] | None = None
    for name, schema in schemas.items():
        columns = [column for column in folder_columns(name) if column not in schema.names]
        first = first or (name, columns)
        if columns != first[1]:
            raise InputError(
                f"{name}: its folders give the columns {columns}, those of {first[0]} give "
                f"{first[1]}, but a Delta table has one set. Set data.format to parquet."
            )
    return first[1] if first else []


def _schema_of(path: Address) -> pa.Schema:
    with open_parquet(path) as file:
        return open_schema(str(path), pa.schema(written_fields(file)))


def _all_typed(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, filled(field.type)) for field in schema])


def _one_schema(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The columns of all files together; a file that lacks a column reads as null there.

    A column of type null in one file gets its type from the others. InputError when two files give
    a column different types, or when names differ only in case.
    """
    kinds: dict[str, tuple[str, pa.DataType]] = {}
    folded: dict[str, str] = {}
    for name, schema in schemas.items():
        for field in schema:
            if (other := folded.setdefault(field.name.casefold(), field.name)) != field.name:
                raise InputError(
                    f"{name}: a Delta table cannot have both columns {field.name!r} and {other!r}: "
                    f"it ignores case. {HINT}"
                )
            first, kind = kinds.get(field.name, (name, field.type))
            common = joined(kind, field.type)
            if common is None:
                raise InputError(
                    f"{name}: column {field.name!r} has the type {field.type}, but {kind} in "
                    f"{first}; a Delta table has one type. Set data.format to parquet."
                )
            # A message about another type names the file that gave the column its type.
            kinds[field.name] = (first if common == kind else name, common)
    return pa.schema([(name, kind) for name, (_, kind) in kinds.items()])
