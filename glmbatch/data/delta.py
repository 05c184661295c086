"""A Delta Lake table over published files: its readers see each publication whole, or the one before. Knows no jobs.

The table is a log, OUTPUT/_delta_log, that names the Parquet files of each version. Files of earlier versions stay for
those who still read them; Delta's own `vacuum` takes them away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import pyarrow as pa

from glmbatch.data.parquet import is_text, open_parquet
from glmbatch.data.storage import writable
from glmbatch.errors import InputError

if TYPE_CHECKING:
    from deltalake import DeltaTable

LOG = "_delta_log"
APPLICATION = "glmbatch"  # the name under which the log counts our publications
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
WIDER = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.date64(): pa.date32()}
SAME = frozenset({pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.date32()})
HINT = "Set data.format to parquet, or leave the column out."


def check_sources(root: Path, names: list[str]) -> None:
    """InputError when the Parquet files `names` below `root` cannot stand in one table."""
    try:
        import deltalake  # noqa: F401
    except ImportError as error:
        raise InputError(
            "data.format is delta, and deltalake is not installed. Run pip install 'glmbatch[delta]'."
        ) from error
    _partition_columns({name: _schema_of(root / name) for name in names})


def delta_schema(where: str, schema: pa.Schema) -> pa.Schema:
    """`schema` in types that Delta Lake has; InputError, beginning with `where`, for a column that has none.

    Unsigned integers become the next wider ones, times are cut to microseconds, text without a type becomes text.
    """
    return pa.schema([_delta_field(where, field) for field in schema], schema.metadata)


def _delta_field(where: str, field: pa.Field) -> pa.Field:
    kind = _delta_type(field.type)
    if kind is None:
        raise InputError(f"{where}: column {field.name!r} holds {field.type}, for which Delta Lake has no type. {HINT}")
    return pa.field(field.name, kind, nullable=True)


def _delta_type(kind: pa.DataType) -> pa.DataType | None:
    """The Arrow type that Delta Lake's type for `kind` reads as; None where there is none."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_text(kind):
        holds_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
        return pa.binary() if holds_bytes else pa.string()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    return kind if kind in SAME or pa.types.is_decimal128(kind) else WIDER.get(kind, _delta_nested(kind))


def _delta_nested(kind: pa.DataType) -> pa.DataType | None:
    parts = [kind.field(at).type for at in range(kind.num_fields)]
    inner = [_delta_type(part) for part in parts]
    if not inner or None in inner:
        return None
    if pa.types.is_struct(kind):
        names = [kind.field(at).name for at in range(kind.num_fields)]
        return pa.struct(list(zip(names, inner, strict=True)))
    if pa.types.is_map(kind):
        return pa.map_(_delta_type(kind.key_type), _delta_type(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(inner[0])
    return None


def commit_table(root: Path, rows: Mapping[str, int]) -> None:
    """Make the table in `root` consist of just the files `rows` (name below `root` to number of rows), in one commit.

    Safe to repeat: what is there already is not committed again. InputError when the files cannot stand in one table.
    """
    from deltalake import CommitProperties, DeltaTable, Schema, Transaction
    from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

    table, live = DeltaTable(root) if (root / LOG).is_dir() else None, table_files(root)
    if table is not None and live == set(rows):
        return
    schemas = {name: _schema_of(root / name) for name in rows}
    partitions, schema = _partition_columns(schemas), _one_schema(schemas)
    now, version = int(time.time() * 1000), table.transaction_version(APPLICATION) if table is not None else None
    once = CommitProperties(app_transactions=[Transaction(APPLICATION, (version or 0) + 1, now)])

    def add(name: str) -> AddAction:
        stats = json.dumps({"numRecords": rows[name]})
        return AddAction(name, (root / name).stat().st_size, partition_values(name, partitions), now, True, stats)

    columns = pa.schema([*schema, *(pa.field(name, pa.string()) for name in partitions)])
    with writable(root / LOG):
        if table is None:
            adds = [add(name) for name in rows]
            create_table_with_add_actions(
                str(root), Schema.from_arrow(columns), adds, partition_by=partitions, commit_properties=once
            )
            return
        actions: list[AddAction | RemoveAction] = [add(name) for name in rows if name not in live]
        mode: Literal["overwrite", "append"] = "overwrite"
        if live & set(rows):  # else nothing stays, and columns may change as they like
            mode, columns = "append", _grow(root, table, columns)
            for name in sorted(live - set(rows)):
                actions.append(RemoveAction(name, True, now, None, partition_values(name, partitions)))
        table.create_write_transaction(actions, mode, Schema.from_arrow(columns), partitions, commit_properties=once)


def table_files(root: Path) -> set[str]:
    """Names below `root` of the files of the table's latest version; none when there is no table."""
    from deltalake import DeltaTable

    if not (root / LOG).is_dir():
        return set()
    actions = DeltaTable(root).get_add_actions(flatten=True)
    return {unquote(path) for path in pa.table(actions).column("path").to_pylist()}


def partition_values(name: str, columns: list[str]) -> dict[str, str | None]:
    """What the folders of the file `name` say of the partition `columns`."""
    folders = dict(part.split("=", 1) for part in PurePosixPath(name).parts[:-1] if "=" in part)
    values = {column: unquote(folders[column]) for column in columns}
    return {column: None if value == NULL_PARTITION else value for column, value in values.items()}


def _partition_columns(schemas: Mapping[str, pa.Schema]) -> list[str]:
    """The columns that folders such as day=1 give to every file, without those that the files hold themselves."""
    first: tuple[str, list[str]] | None = None
    for name, schema in schemas.items():
        folders = [part.split("=", 1)[0] for part in PurePosixPath(name).parts[:-1] if "=" in part]
        columns = [column for column in dict.fromkeys(folders) if column not in schema.names]
        first = first or (name, columns)
        if columns != first[1]:
            raise InputError(
                f"{name}: its folders give the columns {columns}, those of {first[0]} give {first[1]}; a Delta table "
                "has one set. Set data.format to parquet."
            )
    _one_schema(schemas)
    return first[1] if first else []


def _schema_of(path: Path) -> pa.Schema:
    with open_parquet(path) as file:
        return delta_schema(str(path), file.schema_arrow.remove_metadata())


def _one_schema(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The columns of all files; a file without one reads as null there."""
    kinds: dict[str, tuple[str, pa.DataType]] = {}
    for name, schema in schemas.items():
        for field in schema:
            first, kind = kinds.setdefault(field.name, (name, field.type))
            if field.type != kind:
                raise InputError(
                    f"{name}: column {field.name!r} holds {field.type}, in {first} it holds {kind}; a Delta table has "
                    "one type. Set data.format to parquet."
                )
    return pa.schema([(name, kind) for name, (_, kind) in kinds.items()])


def _grow(root: Path, table: DeltaTable, columns: pa.Schema) -> pa.Schema:
    """Give the table those of `columns` that it lacks; all its columns. A column that no file has any more stays."""
    from deltalake import Schema

    there = pa.schema(table.schema().to_arrow())
    whole = _one_schema({"the table": delta_schema(str(root), there), "this run": columns})
    new = pa.schema([field for field in whole if field.name not in there.names])
    if len(new):
        table.alter.add_columns(Schema.from_arrow(new).fields)
    return whole
