"""`glmbatch snapshot`: its arguments, and what it prints."""

from __future__ import annotations

import argparse

from glmbatch.cli.output import show
from glmbatch.errors import InputError, counted


def add_snapshot(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "address",
        metavar="ADDRESS",
        help="postgresql://host/database; user and password come from PGUSER and PGPASSWORD or "
        "~/.pgpass",
    )
    command.add_argument("file", metavar="FILE", help="Parquet file to write, for data.input")
    command.add_argument("--table", metavar="NAME", help="table or view to read, as in public.rows")
    command.add_argument("--query", metavar="SQL", help="query to read instead of a table")
    command.add_argument(
        "--key", required=True, metavar="COLUMN", help="column that is different in each row"
    )


def snapshot(parsed: argparse.Namespace) -> int:
    """Write the snapshot; the exit code is 0."""
    from glmbatch.store.inputs.database import table_query, take_snapshot

    if (parsed.table is None) == (parsed.query is None):
        raise InputError("snapshot: set --table or --query, one of the two.")
    query = parsed.query if parsed.table is None else table_query(parsed.table)
    taken = take_snapshot(parsed.address, query, parsed.key, parsed.file)
    end = "; unchanged" if taken.same else ""
    show(f"{taken.file}: {counted(taken.rows, 'row')} of {counted(taken.columns, 'column')}{end}")
    return 0
