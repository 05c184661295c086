"""The table over published files, of any format: its readers see whole publications only.

A table names the files of each of its versions. Files of earlier versions stay for their readers,
until the format's own tools delete them. Knows no jobs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from glmbatch.errors import InputError, shown
from glmbatch.ledger.fragments import Fragment
from glmbatch.ledger.ledger import PUBLISHING
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.ledger.receipts import OutputReceipt, read_receipt
from glmbatch.ledger.tables import delta, iceberg
from glmbatch.ledger.tables.columns import Added, Commit, Current, fitted, schema_of
from glmbatch.ledger.tables.types import FORMATS, typed_text
from glmbatch.settings.kinds import OutputFormat
from glmbatch.store.files import exists
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.found import Version
from glmbatch.store.paths import Address, AnyPath


@dataclass(frozen=True, slots=True)
class Table:
    """The table over the files of an output folder, its `root`; Iceberg's has a `name`."""

    root: AnyPath
    format: OutputFormat
    name: str = ""

    @property
    def where(self) -> str:
        """What messages call it."""
        return self.name or str(self.root)

    def read(self) -> Current:
        """The table as it is. InputError when it is not ours, or its package is not installed."""
        if self.format == "iceberg":
            return iceberg.current(self.root, self.name)
        return delta.current(self.root)

    def read_version(self) -> int | None:
        """The number of the table's current version; None without a table. Lists no files."""
        if self.format == "iceberg":
            return iceberg.table_version(self.root, self.name)
        return delta.table_version(self.root)

    def list_files(self) -> set[str]:
        """The names of the files in the table's current version; none without a table."""
        if self.format == "iceberg":
            return iceberg.table_files(self.root, self.name)
        return delta.table_files(self.root)


def table_over(root: Address, format: OutputFormat, name: str = "") -> Table | None:
    """The table over the output `root`; None for an output that is plain Parquet."""
    return None if format == "parquet" else Table(Folder(root).path, format, name)


def table_in(root: Address) -> Table | None:
    """The table over the output `root` that its log or metadata there tell of; None without one."""
    if delta.is_table(root):
        return table_over(root, "delta", "")
    name = iceberg.name_in(Folder(root).path)
    return table_over(root, "iceberg", name) if name else None


def check_sources(
    table: Table,
    sources: Mapping[str, Fragment],
    published: Mapping[str, bool],
    version: Version | None,
) -> dict[str, str]:
    """Check that the files of `sources` can be in one `table`: a fragment of each, by name.

    `version` is that of the table which they come from, if they do. `published` says of each
    published file, by name, whether it stays beside them. Returns for each source the types that
    other files give to its columns without one, as `typed_text`.
    InputError when the columns do not match, when others changed the table, or as `Table.read`.
    """
    current = own_table(table, published)
    staying = {name for name, stays in published.items() if stays}
    _refuse_deleted(table, current, staying)
    # The table has the columns of its files, so their footers are not read.
    others = staying - current.files
    form = FORMATS[table.format]
    schemas = {}
    for name, source in sources.items():
        if exists(path := source.stored or source.path):
            schemas[name] = schema_of(form, path, source.fitted, source.columns)
    for name in others:
        if exists(table.root / name):
            schemas[name] = schema_of(form, table.root / name)
    columns, _ = fitted(form, table.where, current.columns, Added(schemas, version), bool(staying))
    return {name: typed_text(schemas[name], columns.schema) for name in sources if name in schemas}


def own_table(table: Table, published: Collection[str]) -> Current:
    """The table as it is. InputError when others wrote to it, or as `Table.read`.

    The next publication would remove rows of others. `published` are the names of our files.
    """
    current = table.read()
    if table.format == "delta":  # Iceberg's snapshots say themselves who made them
        _refuse_others(table, current.files - set(published))
    return current


def _refuse_others(table: Table, names: Collection[str]) -> None:
    """InputError if others added one of the table's files `names`: the next commit removes them."""
    for name in sorted(names):
        # A killed run may have committed its files without a manifest.
        if read_receipt(table.root / name, OutputReceipt) is None:
            raise InputError(
                f"{table.where}: others wrote to the Delta table ({shown(name)}). A publication "
                "would remove their rows. Restore the last version of glmbatch, without the files "
                "that a vacuum has deleted, or set data.output."
            )


def _refuse_deleted(table: Table, current: Current, staying: Collection[str]) -> None:
    """InputError if others deleted one of the files `staying`: the next commit puts it back."""
    gone = sorted(set(staying) - current.files)
    # Others may compact an Iceberg table, and its snapshots say what else they did.
    if not gone or table.format != "delta" or current.columns is None:
        return
    if not exists(table.root / PUBLISHING):  # a killed run may have made the commit
        raise InputError(
            f"{table.where}: others deleted rows of the Delta table ({shown(gone[0])}). A "
            "publication would put them back. Restore the last version of glmbatch. To remove "
            "rows, change their sources, or remove these and set data.missing_sources to drop."
        )


def table_faults(table: Table, published: Collection[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with a `table` over the files `published`: a name or "", and the fault.

    InputError when the table cannot be used at all.
    """
    files = table.list_files()
    advice = "; run the job again"
    try:
        _refuse_deleted(table, own_table(table, published), published)
    except InputError as error:  # the next run would be refused too
        yield "", str(error)
        advice = ""
    for name in sorted(files ^ set(published)):
        where = "the table" if name in files else MANIFEST
        yield name, f"is only in {where}{advice}"


def plan_commit(table: Table, files: Mapping[str, AnyPath], version: Version | None) -> Commit:
    """Plan the version of the `table` that has exactly `files`; writes nothing.

    `files` maps names below its root to the current paths. `version` is that of the table which was
    read, if one was. InputError when one table cannot hold them all.
    """
    current = table.read()
    form = FORMATS[table.format]
    # The table has the columns of its files, so only the footers of new ones are read.
    schemas = {
        name: schema_of(form, path) for name, path in files.items() if name not in current.files
    }
    some_stay = bool(current.files & files.keys())
    columns, grows = fitted(form, table.where, current.columns, Added(schemas, version), some_stay)
    return Commit(columns, grows, current.files, current.version)


def commit_table(
    table: Table, rows: Mapping[str, int], plan: Commit, *, run: str = "", fences: bool = False
) -> None:
    """Commit a version of the `table` with exactly the files in `rows`, which `run` publishes.

    `rows` maps file names to numbers of rows. Safe to repeat: a table that has just these files is
    not committed again, unless the commit `fences` off one that another run sent and did not
    finish, which fails after ours. The commit is on disk when this returns. TransientError when
    another commit came between, InputError when the table cannot be used.
    """
    if not fences and plan.known == set(rows):
        return
    if table.format == "iceberg":
        iceberg.commit(table.root, table.name, rows, plan, run)
    else:
        delta.commit(table.root, rows, plan)
