"""What a run reads of a table: the files of one version. Each format of tables gives these.

A file of a table is written once and never changes. So its size and time, as the table itself
records them, say whether it was published before, without a look at the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from glmbatch.errors import InputError, shown
from glmbatch.store.inputs.find import SETTING, name_fault
from glmbatch.store.inputs.found import Found, Version
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.paths import AnyPath, is_hidden
from glmbatch.store.tables.bounds import ColumnBounds


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file of a table: its name below the table's folder, and its stamp (size, time).

    `partitions` are the values that the table records for the partition columns that the file
    itself does not have. They come out of Arrow, in the types of the table. `unsaid` is as in
    `Found`, for one file.
    """

    name: str
    stamp: tuple[int, int]
    partitions: Mapping[str, object] = field(default_factory=dict)
    unsaid: Mapping[str, str | None] = field(default_factory=dict)


def found_table(
    root: AnyPath,
    version: Version,
    files: Sequence[TableFile],
    columns: pa.Schema,
    bounds: Mapping[str, ColumnBounds] | None = None,
) -> Found:
    """The `files` of a table in the folder `root`, as an input; `columns` are as in `Found`.

    `bounds` are those of some columns, in the order of `files`.

    InputError when there are none, or when a file's place does not say what the table says of it.
    """
    for file in files:
        _check_place(root, file)
    if not files:
        raise InputError(
            f"{shown(root)}: {version} has no files, so there are no rows to read; what was "
            f"published stays. Set data.version to an earlier one, or {SETTING}."
        )
    # Names of folders outlive those of columns, and some stand for a transform of one.
    hidden = set().union(*(file.unsaid for file in files)) - {*columns.names}
    order = pa.array(sorted(range(len(files)), key=lambda place: files[place].name))
    return Found(
        root=root,
        kind="table",
        names=sorted(file.name for file in files),
        stamps={file.name: file.stamp for file in files},
        links=frozenset(),
        refused={},
        skipped=[],
        version=replace(version, hidden=tuple(sorted(hidden))),
        columns=columns,
        unsaid={file.name: file.unsaid for file in files if file.unsaid},
        bounds={name: column.take(order) for name, column in (bounds or {}).items()},
    )


def _check_place(root: AnyPath, file: TableFile) -> None:
    """InputError unless the output can mirror the file's place, with its partition values."""
    where = f"{shown(root)}: the table's file {shown(file.name)}"
    if "://" in file.name or file.name.startswith("/"):
        raise InputError(
            f"{where} lies outside of its folder, as in a shallow clone. Read the table that was "
            "cloned, or make a deep clone."
        )
    if fault := name_fault(file.name):
        raise InputError(f"{where}: {fault}")
    if is_hidden(file.name):
        raise InputError(
            f"{where} has a part that begins with . or _, which readers of a folder skip. Rewrite "
            "the table without it."
        )
    folders = folder_columns(file.name)
    for column, value in file.partitions.items():
        if column not in folders or not _says(folders[column], value):
            raise InputError(
                f"{where} belongs to {column}={value}, but its folders do not say so. Rewrite the "
                "table with folders for its partitions, without prefixes of another form."
            )


def _says(text: str | None, value: object) -> bool:
    """Whether the `text` in a folder's name stands for `value`."""
    if text is None or value is None:
        return text is None and value is None
    scalar = pa.scalar(value)
    if pa.types.is_timestamp(scalar.type) and not text.endswith("Z"):
        scalar = scalar.cast(pa.timestamp(scalar.type.unit))  # without a zone, it is in UTC
    try:
        return bool(pa.scalar(text).cast(scalar.type) == scalar)
    except pa.ArrowException:
        return False
