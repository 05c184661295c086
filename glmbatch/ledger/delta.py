"""A Delta Lake table over published files, whose readers see a publication whole or not at all.

Knows no jobs.

The table is a log, OUTPUT/_delta_log, that names the Parquet files of each version. Files of
earlier versions stay for those who still read them; Delta's own `vacuum` takes them away.
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
from glmbatch.ledger.delta_types import HINT, delta_schema, filled, joined, open_schema, typed_text
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
APPLICATION = "glmbatch"  # the name under which the log counts our publications


def check_sources(
    output: Address, sources: Mapping[str, Address], staying: Sequence[str]
) -> dict[str, str]:
    """InputError when the Parquet files `sources` (name to path) do not fit the table of `output`.

    The files `staying` of the table, by name, stay there beside them. Returns for each source which
    types its columns without one get from the others (see `typed_text`).
    """
    try:
        import deltalake  # noqa: F401
    except ImportError as error:
        raise InputError(
            "data.format is delta, and deltalake is not installed. Run pip install "
            "'glmbatch[delta]'."
        ) from error
    root = _local(output)
    with _delta_errors(root):
        table = _open(root)
        if table is not None and table.transaction_version(APPLICATION) is None:
            raise InputError(
                f"{root}: is a Delta table that glmbatch did not write. Set data.output."
            )
        files = {**sources, **{name: root / name for name in staying}}
        schemas = {name: _schema_of(path) for name, path in files.items() if exists(path)}
        columns, _, _ = _fit(root, table, schemas, bool(staying))
        return {name: typed_text(schemas[name], columns) for name in sources if name in schemas}


@dataclass(frozen=True, slots=True)
class Commit:
    """The next version of a table: its columns, and how they replace those of the last one."""

    columns: pa.Schema
    partitions: list[str]
    mode: Literal["overwrite", "append"]
    known: frozenset[str]  # files of the last version


def _local(root: Address) -> Path:
    local = Folder(root).local
    if local is not None:
        return local
    raise InputError(
        f"{root}: a Delta table is written on this machine only. Set data.format to parquet, or "
        "data.output."
    )


def plan_commit(root: AnyPath, files: Mapping[str, AnyPath]) -> Commit:
    """How the table in `root` comes to hold just `files` (name below `root` to where it lies now).

    InputError when they cannot stand in one table; nothing is written.
    """
    root = _local(root)
    with _delta_errors(root):
        table = _open(root)
        known = _live_files(table)
        schemas = {name: _schema_of(path) for name, path in files.items()}
        columns, partitions, grows = _fit(root, table, schemas, bool(known & files.keys()))
        return Commit(columns, partitions, "append" if grows else "overwrite", frozenset(known))


def commit_table(root: AnyPath, rows: Mapping[str, int], commit: Commit) -> None:
    """Make the table in `root` hold just the files `rows` (name to number of rows), in one commit.

    Safe to repeat: a table that holds them is not committed again. The commit reaches the disk
    before the return.
    """
    from deltalake import CommitProperties, Schema, Transaction
    from deltalake.transaction import create_table_with_add_actions

    if commit.known == set(rows):
        return
    root = _local(root)
    with _delta_errors(root), writable(root / LOG):
        table = _open(root)
        version = table.transaction_version(APPLICATION) if table is not None else None
        # For other tools, which count our publications by it.
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
            # An overwrite removes all other files by itself.
            removes = _removes(rows, commit) if commit.mode == "append" else []
            table.create_write_transaction(
                [*removes, *adds],
                commit.mode,
                schema,
                commit.partitions,
                commit_properties=properties,
            )
        # The log's last entries: a new column joins in a commit of its own before the files.
        for path in (*sorted((root / LOG).glob("*.json"))[-2:], root / LOG, root):
            sync(path)


def _adds(root: Path, rows: Mapping[str, int], commit: Commit) -> list[AddAction]:
    """The log's entries for files that the last version lacks."""
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
    """The log's entries for files of the last version that the next one lacks."""
    from deltalake.transaction import RemoveAction

    milliseconds = int(time.time() * 1000)
    removes = []
    for name in sorted(commit.known - set(rows)):
        values = partition_values(name, commit.partitions)
        removes.append(RemoveAction(name, True, milliseconds, None, values))
    return removes


def _grow(table: DeltaTable, commit: Commit) -> None:
    """Give the table the columns that it lacks, and what its readers must know for its types."""
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
    """Names below `root` of the files in the table's latest version; none without a table."""
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
    return any((Folder(root) / LOG).glob("*.json"))


def _open(root: Path) -> DeltaTable | None:
    from deltalake import DeltaTable

    return DeltaTable(root) if is_table(root) else None


@contextmanager
def _delta_errors(root: Path) -> Iterator[None]:
    """Turn the errors of deltalake into ours. A conflict with another commit is transient."""
    try:
        yield
    except GlmbatchError:
        raise
    except Exception as error:  # deltalake raises bare ones too
        # Some of its errors carry a backtrace, which begins with number 0.
        reason = one_line(error, limit=300).partition(" 0: ")[0]
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{root}: cannot be read now: {error.strerror}.") from error
        if "conflict" in type(error).__name__.lower() or "conflict" in reason.lower():
            raise TransientError(f"{root}: another commit came between: {reason}") from error
        raise InputError(
            f"{root}: the Delta table cannot be used: {reason}. Move its {LOG} away, so that the "
            "next run begins its history anew with all its rows. Or else: Set data.output."
        ) from error


def _fit(
    root: Path, table: DeltaTable | None, schemas: Mapping[str, pa.Schema], some_stay: bool
) -> tuple[pa.Schema, list[str], bool]:
    """The table's columns and partition columns with these files, and whether columns only join."""
    partitions = _partition_columns(schemas)
    columns = pa.schema(
        [*_one_schema(schemas), *(pa.field(name, pa.string()) for name in partitions)]
    )
    if table is None:
        return _all_typed(columns), partitions, True
    if schemas and table.metadata().partition_columns != partitions:
        raise InputError(
            f"{root}: its partition columns are {table.metadata().partition_columns}, those of "
            f"this run {partitions}. "
            "Set data.output."
        )
    table_schema = delta_schema(str(root), pa.schema(table.schema().to_arrow()))
    try:
        both = _one_schema({"the table": table_schema, "this run": columns})
        return _all_typed(both), partitions, True
    except InputError as error:
        if some_stay:
            raise InputError(f"{root}: {error}") from error
        # Nothing stays, so columns may change as they like.
        return _all_typed(columns), partitions, False


def partition_values(name: str, columns: list[str]) -> dict[str, str | None]:
    """What the folders of the file `name` say of the partition `columns`."""
    folders = folder_columns(name)
    return {column: folders[column] for column in columns}


def _partition_columns(schemas: Mapping[str, pa.Schema]) -> list[str]:
    """The columns that folders such as day=1 give to every file, and that no file holds itself."""
    first: tuple[str, list[str]] | None = None
    for name, schema in schemas.items():
        columns = [column for column in folder_columns(name) if column not in schema.names]
        first = first or (name, columns)
        if columns != first[1]:
            raise InputError(
                f"{name}: its folders give the columns {columns}, those of {first[0]} give "
                f"{first[1]}; a Delta table "
                "has one set. Set data.format to parquet."
            )
    return first[1] if first else []


def _schema_of(path: Address) -> pa.Schema:
    with open_parquet(path) as file:
        return open_schema(str(path), pa.schema(written_fields(file)))


def _all_typed(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, filled(field.type)) for field in schema])


def _one_schema(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The columns of all files; a file without one reads as null there.

    A column that is null in one file has the type of the others.
    """
    kinds: dict[str, tuple[str, pa.DataType]] = {}
    folded: dict[str, str] = {}
    for name, schema in schemas.items():
        for field in schema:
            if (other := folded.setdefault(field.name.casefold(), field.name)) != field.name:
                raise InputError(
                    f"{name}: a Delta table does not tell column {field.name!r} from {other!r}. "
                    f"{HINT}"
                )
            first, kind = kinds.get(field.name, (name, field.type))
            common = joined(kind, field.type)
            if common is None:
                raise InputError(
                    f"{name}: column {field.name!r} holds {field.type}, in {first} it holds "
                    f"{kind}; a Delta table has "
                    "one type. Set data.format to parquet."
                )
            # The file that first gave it a type is the one to be named beside another type.
            kinds[field.name] = (first if common == kind else name, common)
    return pa.schema([(name, kind) for name, (_, kind) in kinds.items()])
