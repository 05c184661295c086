"""The files of a Delta Lake table at one version, from its log. Opens no file of rows.

Uses the library deltalake, which reads the log and its checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa

from glmbatch.errors import MACHINE_ERRNOS, GlmbatchError, InputError, TransientError, shown
from glmbatch.store.errors import one_line
from glmbatch.store.inputs.found import Found, Version
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.objects.access import storage_options
from glmbatch.store.paths import AnyPath
from glmbatch.store.tables.bounds import ColumnBounds
from glmbatch.store.tables.fitting import table_columns
from glmbatch.store.tables.table import TableFile, found_table

if TYPE_CHECKING:
    from deltalake import DeltaTable

LOG = "_delta_log"
INSTALL = "Run pip install 'glmbatch[delta]'."
# What a table may need of its readers, and is served. The others are refused here or by deltalake.
SERVED = frozenset(
    {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "typeWidening", "typeWidening-preview"}
)
MAPPING, VECTORS = "columnMapping", "deletionVectors"


def find_delta(folder: AnyPath, number: int | None, tested: Collection[str] = ()) -> Found:
    """The files of the Delta table in `folder` at version `number`, or at its newest.

    InputError when there is no such version, when rows cannot be read from the files as they are,
    or when a condition tests a partition that it cannot: `tested` are its columns.
    """
    with delta_errors(folder, "Set data.input."):
        table = open_delta(folder)
        newest = table.version()
        if number is not None and number != newest:
            if number > newest:
                raise InputError(
                    f"{shown(folder)}: has no version {number}; the newest is {newest}. Set "
                    "data.version."
                )
            with delta_errors(folder, f"Set data.version to a later one, up to {newest}."):
                table.load_as_version(number)
        _check_readable(folder, table)
        version = Version("Delta", table.version())
        partitions = table.metadata().partition_columns
        schema = pa.schema(table.schema().to_arrow())
        for name in partitions:
            if name in tested and pa.types.is_timestamp(schema.field(name).type):
                raise InputError(
                    f"{shown(folder)}: partition column {name!r} is a time, and its folders spell "
                    "it in a way that cannot be compared. Test another column. Set data.where."
                )
        columns = table_columns([field for field in schema if field.name not in partitions])
        adds = pa.table(table.get_add_actions(flatten=True))
    files = list(_files(adds, partitions))
    return found_table(folder, version, files, columns, _bounds(adds, columns))


def open_delta(folder: AnyPath) -> DeltaTable:
    """The Delta table in `folder`, at its newest version. InputError without deltalake."""
    try:
        from deltalake import DeltaTable
    except ImportError as error:
        raise InputError(
            f"{shown(folder)}: is a Delta table, but deltalake is not installed. {INSTALL}"
        ) from error
    return DeltaTable(str(folder), storage_options=storage_options(folder))


@contextmanager
def delta_errors(folder: AnyPath, advice: str) -> Iterator[None]:
    """Turn errors of deltalake into ours. A conflict with another commit is transient."""
    try:
        yield
    except GlmbatchError:
        raise
    except Exception as error:  # deltalake also raises bare Exception
        from deltalake.exceptions import CommitFailedError

        # Some of its errors include a backtrace, which begins with " 0: ".
        reason = one_line(error, limit=300).partition(" 0: ")[0]
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{folder}: cannot be read now: {error.strerror}.") from error
        if isinstance(error, CommitFailedError):
            raise TransientError(f"{folder}: another commit came between: {reason}.") from error
        if isinstance(error, OSError) and not isinstance(folder, Path):
            (folder / LOG).exists()  # raises our own error, if the store refuses or is away
            raise TransientError(f"{folder}: cannot be used now: {reason}.") from error
        raise InputError(
            f"{shown(folder)}: the Delta table cannot be used: {reason}. {advice}"
        ) from error


def _check_readable(folder: AnyPath, table: DeltaTable) -> None:
    """InputError when the table's files hold other rows or columns than the table."""
    where = f"{shown(folder)}: the Delta table"
    mode = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mode != "none":
        raise InputError(
            f"{where} has column mapping (delta.columnMapping.mode: {mode}), so its files have "
            "other names for its columns. Write it to a table without it, and set data.input to "
            "that."
        )
    features = set(table.protocol().reader_features or ())
    if others := sorted(features - SERVED - {MAPPING, VECTORS}):
        raise InputError(
            f"{where} needs {others[0]} of its readers, which glmbatch does not know. Drop this "
            "feature, or write the rows to a table without it."
        )
    if VECTORS in features and _has_vectors(table):
        raise InputError(
            f"{where} has deletion vectors, so its files hold deleted rows too. Run REORG TABLE "
            "... APPLY (PURGE) on it, and set delta.enableDeletionVectors to false."
        )


def _has_vectors(table: DeltaTable) -> bool:
    return bool(pa.table(table.deletion_vectors().read_all()).num_rows)


def _bounds(adds: pa.Table, columns: pa.Schema) -> dict[str, ColumnBounds]:
    """What the log says of the values of the `columns` in each file."""
    bounds = {}
    for field in columns:
        names = [f"{what}.{field.name}" for what in ("min", "max", "null_count")]
        # Bounds of times may be cut to milliseconds.
        is_exact = not pa.types.is_nested(field.type) and not pa.types.is_timestamp(field.type)
        if is_exact and set(names) <= set(adds.column_names):
            parts = [adds.column(name).combine_chunks() for name in names]
            bounds[field.name] = ColumnBounds(*parts)
    return bounds


def _files(adds: pa.Table, partitions: list[str]) -> Iterator[TableFile]:
    names = ["path", "size_bytes", "modification_time"]
    values = {column: adds.column(f"partition.{column}") for column in partitions}
    for row, add in enumerate(adds.select(names).to_pylist()):
        path = add["path"]
        # An address with a scheme is not below the folder, and is refused as it is.
        name = path if "://" in path else unquote(path)
        yield TableFile(
            name=name,
            stamp=(add["size_bytes"], add["modification_time"]),
            partitions={column: kind[row].as_py() for column, kind in values.items()},
            unsaid=dict.fromkeys(folder_columns(name).keys() - values.keys()),
        )
