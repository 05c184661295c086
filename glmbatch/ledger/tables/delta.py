"""A Delta Lake table over published files: its readers see a publication completely or not at all.

The table is a log, OUTPUT/_delta_log, that names the Parquet files of each version. Files of
earlier versions stay for their readers until Delta's own `vacuum` deletes them. Uses the library
deltalake. Knows no jobs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa

from glmbatch.errors import InputError, TransientError
from glmbatch.ledger.tables.columns import Columns, Commit, Current, partition_values
from glmbatch.store.files import sync, writable
from glmbatch.store.folder import Folder
from glmbatch.store.objects.access import storage_options
from glmbatch.store.paths import Address, AnyPath
from glmbatch.store.tables.delta import INSTALL, LOG, delta_errors, open_delta

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake.transaction import AddAction, RemoveAction

APPLICATION = "glmbatch"  # the application id of our transactions in the log


def current(root: Address) -> Current:
    """The table in `root` as it is.

    InputError when it is not ours, or when deltalake is not installed.
    """
    try:
        import deltalake  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"data.format is delta, but deltalake is not installed. {INSTALL}"
        ) from error
    with _errors(root):
        table = _open(root)
        if table is None:
            return Current(None, frozenset())
        if table.transaction_version(APPLICATION) is None:
            raise InputError(
                f"{root}: is a Delta table that glmbatch did not write. Set data.output."
            )
        schema = pa.schema(table.schema().to_arrow())
        columns = Columns(schema, table.metadata().partition_columns)
        return Current(columns, frozenset(_live_files(table)), table.version())


def commit(root: AnyPath, rows: Mapping[str, int], plan: Commit) -> None:
    """Commit a version of the table in `root` with exactly the files in `rows`.

    `rows` maps file names to numbers of rows. The commit is on disk when this returns.
    TransientError when another commit came between, InputError when the table cannot be used.
    """
    with writable(root / LOG):
        try:
            with _errors(root):
                _commit(root, rows, plan)
        except (InputError, TransientError) as error:
            now = current(root)
            # The commit may be done, and only the answer of the store be lost.
            if now.version == plan.version or now.files != rows.keys():
                if plan.version is None and now.version is not None:
                    raise TransientError(f"{root}: another run made the table.") from error
                raise
    if isinstance(root, Path):
        # The last two entries: a new column is added in a commit of its own before the files.
        for path in (*sorted((root / LOG).glob("*.json"))[-2:], root / LOG, root):
            sync(path)


def _commit(root: AnyPath, rows: Mapping[str, int], plan: Commit) -> None:
    from deltalake import CommitProperties, Schema, Transaction
    from deltalake.transaction import create_table_with_add_actions

    table = _open(root)
    if plan.version != (None if table is None else table.version()):
        raise TransientError(f"{root}: another commit came between. Run the job again.")
    version = table.transaction_version(APPLICATION) if table is not None else None
    # Other tools can tell from it how many publications there were.
    transaction = Transaction(APPLICATION, (version or 0) + 1, int(time.time() * 1000))
    # Not repeated on top of another commit: that may be of a run which took over the lock.
    properties = CommitProperties(app_transactions=[transaction], max_commit_retries=0)
    schema = Schema.from_arrow(plan.columns.schema)
    adds = _adds(root, rows, plan)
    if table is None:
        create_table_with_add_actions(
            str(root),
            schema,
            adds,
            partition_by=plan.columns.partitions,
            storage_options=storage_options(root),
            commit_properties=properties,
        )
        return
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


def _adds(root: AnyPath, rows: Mapping[str, int], plan: Commit) -> list[AddAction]:
    """The log's entries for files that are not in the current version."""
    from deltalake.transaction import AddAction

    milliseconds = int(time.time() * 1000)
    adds = []
    new = [name for name in rows if name not in plan.known]
    for name, stamp in zip(new, Folder(root).stamps(new, len(rows)), strict=True):
        if stamp is None:
            raise TransientError(f"{root / name}: is gone. Run the job again.")
        statistics = json.dumps({"numRecords": rows[name]})
        values = partition_values(name, plan.columns.partitions)
        adds.append(AddAction(name, stamp[0], values, milliseconds, True, statistics))
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
    from deltalake import CommitProperties, Schema, TableFeatures

    once = CommitProperties(max_commit_retries=0)
    table_schema = pa.schema(table.schema().to_arrow())
    new = pa.schema(
        [field for field in plan.columns.schema if field.name not in table_schema.names]
    )
    if plan.grows:
        if len(new):
            table.alter.add_columns(Schema.from_arrow(new).fields, commit_properties=once)
    elif "timestamp_ntz" in Schema.from_arrow(plan.columns.schema).to_json():
        table.alter.add_feature(
            TableFeatures.TimestampWithoutTimezone,
            allow_protocol_versions_increase=True,
            commit_properties=once,
        )


def table_version(root: AnyPath) -> int | None:
    """The number of the table's current version; None without a table."""
    with _errors(root):
        table = _open(root)
        return None if table is None else table.version()


def table_files(root: AnyPath) -> set[str]:
    """The names below `root` of the files in the table's current version; none without a table."""
    with _errors(root):
        return _live_files(_open(root))


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
    return any((Folder(root) / LOG).glob("0*"))


def _open(root: Address) -> DeltaTable | None:
    return open_delta(Folder(root).path) if is_table(root) else None


def _errors(root: Address) -> AbstractContextManager[None]:
    """Turn errors of deltalake about our own table into ours."""
    advice = (
        f"Move its {LOG} away, and the next run starts a new history with all rows; or set "
        "data.output."
    )
    return delta_errors(Folder(root).path, advice)
