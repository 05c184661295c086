"""The files of an Iceberg table at one snapshot, from its metadata. Opens no file of rows.

Uses the library pyiceberg, which finds the table in a catalogue and plans its files.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from glmbatch.errors import InputError, some_of
from glmbatch.settings.addresses import TABLE_SCHEME
from glmbatch.store.errors import one_line
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.find import SETTING
from glmbatch.store.inputs.found import Found, Version
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.tables.bounds import ColumnBounds
from glmbatch.store.tables.catalogs import (
    TableName,
    catalog_errors,
    load_table,
    open_catalog,
    table_name,
    tables_beside,
)
from glmbatch.store.tables.fitting import Ids, table_columns
from glmbatch.store.tables.table import TableFile, found_table
from glmbatch.store.values import is_text

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.partitioning import PartitionSpec
    from pyiceberg.schema import Schema
    from pyiceberg.table import FileScanTask, Table
    from pyiceberg.table.name_mapping import MappedField
    from pyiceberg.table.snapshots import Snapshot
    from pyiceberg.types import NestedField

MAPPING = "schema.name-mapping.default"
MOST_NAMED = 5


def find_iceberg(
    address: str,
    number: int | None,
    schema_id: int | None = None,
    tested: Collection[str] = (),
) -> Found:
    """The files of the Iceberg table iceberg:CATALOG/namespace.name at the snapshot `number`.

    Without a number, at its current one. The columns are those of the schema `schema_id`. Without
    that, they are the table's own at its current snapshot, else those that the snapshot had. Only
    the columns `tested` by a condition get bounds.

    InputError when there is no such snapshot or schema, or when rows cannot be read from the files
    as they are.
    """
    name, table = _open(address)
    with catalog_errors(name):
        snapshot = table.current_snapshot() if number is None else table.snapshot_by_id(number)
        if snapshot is None:
            raise _no_snapshot(name, table, number)
        schema = _schema(name, table, snapshot, schema_id)
        _check_defaults(name, schema)
        specs = table.specs()
        columns = table_columns(schema.as_arrow(), _mapped(name, table))
        times = {field.name for field in columns if pa.types.is_timestamp(field.type)}
        files, said = [], []
        for task in table.scan(snapshot_id=snapshot.snapshot_id).plan_files():
            _check_file(name, task)
            spec = specs[task.file.spec_id]
            values = _values(task.file, spec, schema)
            files.append(_file(task.file, table.location(), values, times))
            said.append((task.file, _identities(spec, schema)))
        bounds = {
            field.name: _bounds(field, columns.field(field.name).type, said)
            for field in schema.fields
            if field.name in tested
        }
    root = Folder(_address(table.location())).path
    version = Version("Iceberg", snapshot.snapshot_id, str(name), schema.schema_id)
    return found_table(root, version, files, columns, bounds)


def location_of(address: str) -> str:
    """The folder of the Iceberg table iceberg:CATALOG/namespace.name, as an address of ours."""
    return _address(_open(address)[1].location())


def _open(address: str) -> tuple[TableName, Table]:
    name = table_name(address.removeprefix(TABLE_SCHEME))
    catalog = open_catalog(name)
    table = load_table(catalog, name)
    if table is None:
        beside = tables_beside(catalog, name)
        what = f"namespace {name.namespace!r}"
        if beside is not None:
            what = f"such table; {name.namespace} has {some_of(beside, name.identifier)}"
        raise InputError(f"{name}: the catalogue has no {what}. Set {SETTING}.")
    return name, table


def _no_snapshot(name: TableName, table: Table, number: int | None) -> InputError:
    if number is None:
        return InputError(
            f"{name}: the table has no snapshot, so there are no rows to read; what was published "
            f"stays. Wait for rows, or set {SETTING}."
        )
    kept = [snapshot.snapshot_id for snapshot in table.snapshots()[-MOST_NAMED:]]
    return InputError(
        f"{name}: has no snapshot {number}; it may have expired, or a browser has rounded its "
        f"number. The newest are {kept}. Set data.version, in a form as text."
    )


def _schema(name: TableName, table: Table, snapshot: Snapshot, schema_id: int | None) -> Schema:
    if schema_id is None and snapshot.snapshot_id != table.metadata.current_snapshot_id:
        schema_id = snapshot.schema_id
    # A column that was added since belongs to the table too, though not to its older snapshots.
    if schema_id is None:
        return table.schema()
    if schema_id not in table.schemas():
        raise InputError(
            f"{name}: has no schema {schema_id} any more, with which snapshot "
            f"{snapshot.snapshot_id} was read. Run again."
        )
    return table.schemas()[schema_id]


def _mapped(name: TableName, table: Table) -> Ids:
    """The ids of the names in the table's mapping; none without one. InputError if it is wrong."""
    try:
        mapping = table.name_mapping()
        return {} if mapping is None else _ids(mapping.root)
    except ValueError as error:
        raise InputError(
            f"{name}: its {MAPPING} cannot be read: {one_line(error, limit=300)}. Correct it."
        ) from error


def _ids(fields: Sequence[MappedField]) -> dict[str, tuple[int, Ids]]:
    ids: dict[str, tuple[int, Ids]] = {}
    for field in fields:
        if "names" not in field.model_fields_set:  # pyiceberg does not look
            raise ValueError(f"the entry of id {field.field_id} has no names")
        if field.field_id is not None:
            ids.update(dict.fromkeys(field.names, (field.field_id, _ids(field.fields))))
    return ids


def _check_defaults(name: TableName, schema: Schema) -> None:
    """InputError when rows of files that lack a column have a value for it."""
    for column in schema.column_names:
        if getattr(schema.find_field(column), "initial_default", None) is not None:
            raise InputError(
                f"{name}: the column {column!r} has a default for rows of earlier files, which "
                "are read as null here. Write the rows to a new table, "
                f"and set {SETTING} to that."
            )


def _check_file(name: TableName, task: FileScanTask) -> None:
    """InputError when the rows of a file are not those of the table."""
    if task.delete_files:
        raise InputError(
            f"{name}: has delete files or deletion vectors, so its files hold deleted rows too. "
            "Run rewrite_data_files on it with delete-file-threshold 1, or write its rows to a new "
            "table."
        )
    if task.file.file_format.value != "PARQUET":
        raise InputError(
            f"{name}: has files of {task.file.file_format.value}, and only Parquet is read. Set "
            "write.format.default to parquet, and run rewrite_data_files on it."
        )


def _identities(spec: PartitionSpec, schema: Schema) -> dict[str, int]:
    """The columns that are partitions by their own value, with their places in a partition."""
    places = {}
    for place, field in enumerate(spec.fields):
        column = schema.find_column_name(field.source_id)
        if str(field.transform) == "identity" and column is not None:
            places[column] = place
    return places


def _values(file: DataFile, spec: PartitionSpec, schema: Schema) -> dict[str, str | None]:
    """The values of a file's identity partitions, as text in which writers name its folders."""
    values: dict[str, str | None] = {}
    for column, place in _identities(spec, schema).items():
        value, kind = file.partition[place], schema.find_type(column)
        transform = spec.fields[place].transform
        values[column] = None if value is None else transform.to_human_string(kind, value)
    return values


def _file(
    file: DataFile, place: str, values: dict[str, str | None], times: Collection[str]
) -> TableFile:
    """The file below `place`. Of its partitions, `times` are timestamps."""
    path = file.file_path.removeprefix(place.rstrip("/") + "/")
    folders = folder_columns(path)
    # Writers name folders in a form of their own, such as null or two+words, or not at all. A
    # folder keeps the name that its column had. The texts of times differ from those in conditions.
    # The files have the columns themselves.
    unsaid = {}
    for column, value in values.items():
        if value != folders.get(column) or column in times:
            unsaid[column] = value
    unsaid |= dict.fromkeys(folders.keys() - values.keys())
    stamp = (file.file_size_in_bytes, _print_of(file))
    return TableFile(path, stamp, unsaid=unsaid)


def _bounds(
    field: NestedField, kind: pa.DataType, said: Sequence[tuple[DataFile, dict[str, int]]]
) -> ColumnBounds:
    """The bounds of the column `field`, of the type `kind`, in each file.

    With each file are the places of its identity partitions.
    """
    key = field.field_id
    rows: list[tuple[Any, Any, int | None]] = []
    for file, places in said:
        if field.name in places:
            value = file.partition[places[field.name]]
            rows.append((value, value, file.record_count if value is None else 0))
        else:
            ends = ((part or {}).get(key) for part in (file.lower_bounds, file.upper_bounds))
            least, greatest = (_bound(field, end) for end in ends)
            rows.append((least, greatest, (file.null_value_counts or {}).get(key)))
    lows, highs, nulls = zip(*rows, strict=True) if rows else ((), (), ())
    return ColumnBounds(_array(lows, kind), _array(highs, kind), pa.array(nulls, pa.int64()))


def _bound(field: NestedField, written: bytes | None) -> Any:
    """The value of a bound as it is `written`; None if it says nothing."""
    from pyiceberg.conversions import from_bytes
    from pyiceberg.types import PrimitiveType

    if written is None or not isinstance(field.field_type, PrimitiveType):
        return None
    try:
        value = from_bytes(field.field_type, written)
    except (struct.error, TypeError, ValueError):  # of a type that the column had before
        return None
    return None if isinstance(value, float) and math.isnan(value) else value


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values of pyiceberg as those of the type `kind`: dates and times are numbers there."""
    if pa.types.is_date32(kind):
        return pa.array(values, pa.int32()).view(kind)
    if pa.types.is_timestamp(kind):
        return pa.array(values, pa.int64()).view(kind)
    try:
        return pa.array(values, pa.string() if is_text(kind) else kind)
    except (pa.ArrowException, TypeError, ValueError):  # no condition goes by bounds of this type
        return pa.nulls(len(values), kind)


def _print_of(file: DataFile) -> int:
    """A number that differs if another file was added under the name of one that was removed.

    Metadata have no time of a file. They do have bounds, and sizes by column.
    """
    parts = (file.column_sizes, file.lower_bounds, file.upper_bounds, file.null_value_counts)
    said = [file.record_count, *(sorted((part or {}).items()) for part in parts)]
    digest = hashlib.sha256(repr([said, file.split_offsets]).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _address(place: str) -> str:
    """The location of a table as an address of ours."""
    for scheme, ours in {"file://": "", "file:": "", "s3a:": "s3:", "s3n:": "s3:"}.items():
        if place.startswith(scheme):
            return ours + place.removeprefix(scheme)
    return place
