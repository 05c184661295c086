"""An Iceberg table over published files. Knows no jobs.

Its location is the output folder, and its metadata are in OUTPUT/metadata. Which metadata count,
the catalogue says. The files stay as they are: they have no field ids, so the table has a mapping
from names. Files of earlier snapshots stay until these are expired.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from glmbatch.errors import InputError, TransientError
from glmbatch.ledger.tables.columns import Columns, Commit, Current, partition_values
from glmbatch.store.files import sync, whole_name, writable
from glmbatch.store.folder import Folder
from glmbatch.store.footers import check_chunks
from glmbatch.store.modes import narrow
from glmbatch.store.parquet import open_parquet
from glmbatch.store.paths import AnyPath
from glmbatch.store.tables.catalogs import (
    TableName,
    catalog_errors,
    load_table,
    open_catalog,
    table_name,
    tables_beside,
)
from glmbatch.store.tables.iceberg import MAPPING

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table, Transaction
    from pyiceberg.table.snapshots import Snapshot

METADATA = "metadata"
RUN = "glmbatch.run"  # in a snapshot's summary: the run that published it
NAME = "glmbatch.table"  # a property of our tables: their name
# pyiceberg would put a commit that came too late on top of the one before it.
NO_RETRY = {"commit.retry.num-retries": "0"}


def current(root: AnyPath, name: str) -> Current:
    """The table over `root` as it is. InputError when it is not ours, or others wrote to it."""
    table = _open(table_name(name), root)
    if table is None:
        _check_namespace(table_name(name), root)
        return Current(None, frozenset())
    with catalog_errors(table_name(name)):
        _refuse_others(table, root, name)
        partitions = [field.name for field in table.spec().fields]
        columns = Columns(table.schema().as_arrow(), partitions)
        return Current(columns, frozenset(_live_files(table, root)), _version(table))


def table_version(root: AnyPath, name: str) -> int | None:
    """The number of the table's current snapshot; None without one."""
    table = _open(table_name(name), root)
    return None if table is None else _version(table)


def table_files(root: AnyPath, name: str) -> set[str]:
    """The names below `root` of the files in the table's current snapshot; none without a table."""
    table = _open(table_name(name), root)
    with catalog_errors(table_name(name)):
        return set() if table is None else set(_live_files(table, root))


def name_in(root: AnyPath) -> str:
    """The name of our table whose metadata are in `root`; empty if there are none.

    Of several, the one that was changed last.
    """
    newest, name = 0, ""
    for path in (root / METADATA).glob("*.metadata.json"):
        content = json.loads(path.read_bytes())
        if NAME in content.get("properties", {}) and content["last-updated-ms"] > newest:
            newest, name = content["last-updated-ms"], str(content["properties"][NAME])
    return name


def _open(name: TableName, root: AnyPath) -> Table | None:
    return load_table(open_catalog(name, root), name)


def _check_namespace(name: TableName, root: AnyPath) -> None:
    if tables_beside(open_catalog(name, root), name) is None:
        raise InputError(
            f"{name}: the catalogue has no namespace {name.namespace!r}. Create it (pyiceberg "
            f"--catalog {name.catalog} create namespace {name.namespace}), or name another."
        )


def _refuse_others(table: Table, root: AnyPath, name: str) -> None:
    """InputError when the table is not ours, is elsewhere, or if others wrote to it."""
    if NAME not in table.properties:
        raise InputError(
            f"{name}: is an Iceberg table that glmbatch did not write. Set data.table to another "
            "name."
        )
    if table.location() != whole_name(root):
        raise InputError(
            f"{name}: is the table over {table.location()}, not over {whole_name(root)}. Set "
            "data.table to another name, or data.output."
        )
    # Files that were rewritten have the same rows, and the next publication names ours again.
    changes = [snapshot for snapshot in _back(table) if not _only_rewrites(snapshot)]
    if changes and not _run_of(changes[0]):
        ours = next((snapshot.snapshot_id for snapshot in changes if _run_of(snapshot)), None)
        back = f"Roll it back to snapshot {ours}, or set" if ours else "Set"
        raise InputError(
            f"{name}: others wrote to the table (snapshot {changes[0].snapshot_id}), and a "
            f"publication would remove their rows. {back} data.table to another name."
        )


def _back(table: Table) -> Iterator[Snapshot]:
    """The snapshots of the table that are not expired, from the current one back."""
    snapshot = table.current_snapshot()
    while snapshot is not None:
        yield snapshot
        parent = snapshot.parent_snapshot_id
        snapshot = None if parent is None else table.snapshot_by_id(parent)


def _run_of(snapshot: Snapshot) -> str | None:
    """The run of glmbatch that published the snapshot; None if it is of others."""
    return None if snapshot.summary is None else snapshot.summary.additional_properties.get(RUN)


def _only_rewrites(snapshot: Snapshot) -> bool:
    return snapshot.summary is not None and snapshot.summary.operation.value == "replace"


def _live_files(table: Table, root: AnyPath) -> dict[str, DataFile]:
    """The files of the current snapshot, by name below `root`; a file elsewhere by its location."""
    from pyiceberg.manifest import ManifestContent

    begin = whole_name(root) + "/"
    files = {}
    snapshot = table.current_snapshot()
    # Not those of a scan, which leaves out files without rows.
    for manifest in snapshot.manifests(table.io) if snapshot is not None else ():
        if manifest.content == ManifestContent.DATA:
            for entry in manifest.fetch_manifest_entry(table.io):
                files[entry.data_file.file_path.removeprefix(begin)] = entry.data_file
    return files


def _version(table: Table) -> int | None:
    snapshot = table.current_snapshot()
    return None if snapshot is None else snapshot.snapshot_id


def commit(root: AnyPath, name: str, rows: Mapping[str, int], plan: Commit, run: str) -> None:
    """Commit a snapshot of the table over `root` with exactly the files in `rows`, by `run`.

    `rows` maps file names to numbers of rows. The commit is on disk when this returns.
    TransientError when another commit came between, InputError when the table cannot be used.
    """
    catalog = open_catalog(table_name(name), root)
    table = load_table(catalog, table_name(name))
    with catalog_errors(table_name(name)), _written(root, rows):
        if plan.version != (None if table is None else _version(table)):
            raise TransientError(f"{name}: another commit came between. Run the job again.")
        if table is None:
            transaction = _creation(catalog, root, table_name(name), plan.columns)
        else:
            properties = {**table.properties, **NO_RETRY}
            table.metadata = table.metadata.model_copy(update={"properties": properties})
            transaction = table.transaction()
            with transaction.update_schema() as update:
                update.union_by_name(plan.columns.schema)
        live = {} if table is None else _live_files(table, root)
        gone = [file for own, file in live.items() if own not in rows]
        producer = transaction.update_snapshot({RUN: run})
        # An append is what readers follow from snapshot to snapshot.
        with producer.overwrite() if gone else producer.merge_append() as snapshot:
            for file in gone:
                snapshot.delete_data_file(file)
            for file in _data_files(transaction, root, [own for own in rows if own not in live]):
                snapshot.append_data_file(file)
        transaction.commit_transaction()


def _creation(catalog: Catalog, root: AnyPath, name: TableName, columns: Columns) -> Transaction:
    """A transaction that creates the table with its first snapshot."""
    transaction = catalog.create_table_transaction(
        name.identifier, columns.schema, location=whole_name(root), properties={NAME: str(name)}
    )
    with transaction.update_spec() as spec:
        for column in columns.partitions:
            spec.add_identity(column)
    mapping = transaction.table_metadata.schema().name_mapping
    transaction.set_properties({MAPPING: mapping.model_dump_json()})
    return transaction


def _data_files(
    transaction: Transaction, root: AnyPath, names: Sequence[str]
) -> Iterator[DataFile]:
    """The table's entries for files that are not in it, with the statistics of their footers."""
    from pyiceberg.io.pyarrow import (
        compute_statistics_plan,
        data_file_statistics_from_parquet_metadata,
        parquet_path_to_id_mapping,
    )
    from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
    from pyiceberg.typedef import Record

    metadata = transaction.table_metadata
    columns = compute_statistics_plan(metadata.schema(), metadata.properties)
    ids = parquet_path_to_id_mapping(metadata.schema())
    partitions = [field.name for field in metadata.spec().fields]

    def entry(named: tuple[str, tuple[int, ...] | None]) -> DataFile:
        name, stamp = named
        if stamp is None:
            raise TransientError(f"{root / name}: is gone. Run the job again.")
        with open_parquet(root / name) as file:
            check_chunks(file)
            statistics = data_file_statistics_from_parquet_metadata(file.metadata, columns, ids)
        return DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=f"{whole_name(root)}/{name}",
            file_format=FileFormat.PARQUET,
            partition=Record(*partition_values(name, partitions).values()),
            file_size_in_bytes=stamp[0],
            sort_order_id=None,
            spec_id=metadata.default_spec_id,
            equality_ids=None,
            key_metadata=None,
            **statistics.to_serialized_dict(),
        )

    folder = Folder(root)
    yield from folder.map(entry, zip(names, folder.stamps(names, len(names)), strict=True))


@contextmanager
def _written(root: AnyPath, names: Iterable[str]) -> Iterator[None]:
    """Keep the metadata that the block writes on a disk as private as the files, and sync them."""
    local = Folder(root).local
    if local is None:
        yield
        return
    folder = local / METADATA
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        narrow(folder, [local / name for name in names])  # statistics have values of the rows
        before = {*folder.iterdir()}
        yield
        for path in (*({*folder.iterdir()} - before), folder, local):
            sync(path)
