"""A Delta Lake table over published files: its readers see a publication completely or not at all.

The table is a log, OUTPUT/_delta_log, that names the Parquet files of each version. Files of
earlier versions stay for their readers until Delta's own `vacuum` deletes them. Uses the library
deltalake. Knows no jobs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa

from glmbatch.errors import MACHINE_ERRNOS, GlmbatchError, InputError, TransientError
from glmbatch.ledger.tables.columns import Columns, Commit, Current, partition_values
from glmbatch.store.errors import one_line
from glmbatch.store.files import sync, writable
from glmbatch.store.folder import Folder
from glmbatch.store.paths import Address, AnyPath

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake.transaction import AddAction, RemoveAction

LOG = "_delta_log"
APPLICATION = "glmbatch"  # the application id of our transactions in the log


def _local(root: Address) -> Path:
    local = Folder(root).local
    if local is not None:
        return local
    raise InputError(
        f"{root}: a Delta table can be written only to a local folder. Set data.format to parquet, "
        "or data.output."
    )


def current(root: Address) -> Current:
    """The table in `root` as it is.

    InputError when it is not ours, or when deltalake is not installed.
    """
    try:
        import deltalake  # noqa: F401
    except ImportError as error:
        raise InputError(
            "data.format is delta, but deltalake is not installed. Run pip install "
            "'glmbatch[delta]'."
        ) from error
    root = _local(root)
    with _delta_errors(root):
        table = _open(root)
        if table is None:
            return Current(None, frozenset())
        if table.transaction_version(APPLICATION) is None:
            raise InputError(
                f"{root}: is a Delta table that glmbatch did not write. Set data.output."
            )
        schema = pa.schema(table.schema().to_arrow())
        columns = Columns(schema, table.metadata().partition_columns)
        return Current(columns, frozenset(_live_files(table)))


def commit(root: AnyPath, rows: Mapping[str, int], plan: Commit) -> None:
    """Commit a version of the table in `root` with exactly the files in `rows`.

    `rows` maps file names to numbers of rows. The commit is on disk when this returns.
    TransientError when another commit came between, InputError when the table cannot be used.
    """
    from deltalake import CommitProperties, Schema, Transaction
    from deltalake.transaction import create_table_with_add_actions

    root = _local(root)
    with _delta_errors(root), writable(root / LOG):
        table = _open(root)
        version = table.transaction_version(APPLICATION) if table is not None else None
        # Other tools can tell from it how many publications there were.
        transaction = Transaction(APPLICATION, (version or 0) + 1, int(time.time() * 1000))
        properties = CommitProperties(app_transactions=[transaction])
        schema = Schema.from_arrow(plan.columns.schema)
        adds = _adds(root, rows, plan)
        if table is None:
            create_table_with_add_actions(
                str(root),
                schema,
                adds,
                partition_by=plan.columns.partitions,
                commit_properties=properties,
            )
        else:
            _grow(table, plan)
            # An overwrite removes all other files on its own.
            removes = _removes(rows, plan) if plan.grows else []
            table.create_write_transaction(
                [*removes, *adds],
                "append" if plan.grows else "overwrite",
                schema,
                plan.columns.partitions,
                commit_properties=properties,
            )
        # The last two entries: a new column is added in a commit of its own before the files.
        for path in (*sorted((root / LOG).glob("*.json"))[-2:], root / LOG, root):
            sync(path)


def _adds(root: Path, rows: Mapping[str, int], plan: Commit) -> list[AddAction]:
    """The log's entries for files that are not in the current version."""
    from deltalake.transaction import AddAction

    milliseconds = int(time.time() * 1000)
    adds = []
    for name in rows:
        if name in plan.known:
            continue
        size_bytes = (root / name).stat().st_size
        statistics = json.dumps({"numRecords": rows[name]})
        values = partition_values(name, plan.columns.partitions)
        adds.append(AddAction(name, size_bytes, values, milliseconds, True, statistics))
    return adds


def _removes(rows: Mapping[str, int], plan: Commit) -> list[RemoveAction]:
    """The log's entries for files of the current version that are not in the next one."""
    from deltalake.transaction import RemoveAction

    milliseconds = int(time.time() * 1000)
    removes = []
    for name in sorted(plan.known - set(rows)):
        values = partition_values(name, plan.columns.partitions)
        removes.append(RemoveAction(name, True, milliseconds, None, values))
    return removes


def _grow(table: DeltaTable, plan: Commit) -> None:
    """Add the columns that the table lacks, and the reader features that its types need."""
    from deltalake import Schema, TableFeatures

    table_schema = pa.schema(table.schema().to_arrow())
    new = pa.schema(
        [field for field in plan.columns.schema if field.name not in table_schema.names]
    )
    if plan.grows:
        if len(new):
            table.alter.add_columns(Schema.from_arrow(new).fields)
    elif "timestamp_ntz" in Schema.from_arrow(plan.columns.schema).to_json():
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
