"""Open a file of the input to plan it. The rows of a file of lines are stored as Parquet first."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glmbatch.errors import InputError, UnusableFile, shown
from glmbatch.ledger.input.unchanged import Look, look_at
from glmbatch.store.files import digest_file
from glmbatch.store.footers import check_chunks, written_form
from glmbatch.store.inputs.filters import RowFilter, check_filter
from glmbatch.store.inputs.found import Found
from glmbatch.store.inputs.needs import SchemaNeeds, check_schema, folder_values
from glmbatch.store.lines.form import Form
from glmbatch.store.lines.stored import OWN_FIELDS, store_lines, stored_lines
from glmbatch.store.parquet import open_parquet, readable
from glmbatch.store.paths import AnyPath
from glmbatch.store.types import check_carried, has_int96


def look_once(path: AnyPath) -> Look:
    """The stamp of a source now. UnusableFile when it cannot be read."""
    with readable(path):
        return look_at(path)


def first_look(found: Found, name: str) -> Look:
    """The stamp of the file `name`, before it is opened: of an object, the one that was listed."""
    path = found.root / name
    if found.version is not None:
        return look_at_one_of(found, name)
    listed = found.stamps.get(name)
    if listed is None or isinstance(path, Path):
        return look_once(path)
    return Look(listed, settled=True)  # the version in it changes with each write


def look_at_one_of(found: Found, name: str) -> Look:
    """The stamp now of the file `name` of a table; its bytes never change.

    InputError when it is gone, as after a vacuum; UnusableFile when it has another size than the
    table says.
    """
    path = found.root / name
    try:
        look = look_once(path)
    except UnusableFile as error:
        if path.exists():
            raise
        raise InputError(
            f"{shown(path)}: is gone, but {found.version} has it; a vacuum may have deleted it. "
            "Set data.version to a later one, or leave it out."
        ) from error
    if look.stamp[0] != found.stamps[name][0]:
        raise UnusableFile(
            f"{shown(path)}: has {look.stamp[0]:,} bytes, but {found.version} says "
            f"{found.stamps[name][0]:,}. Restore the file."
        )
    return look


def check_table(found: Found, address: str, needs: SchemaNeeds, keeps: RowFilter) -> None:
    """InputError when the table at `address` lacks a column that the job needs; opens no file.

    Nothing is checked of an input that is no table: each of its files has columns of its own.
    """
    if found.columns is None:
        return
    hidden = found.version.hidden if found.version else ()
    folders = dict.fromkeys(folder_values(found.names, hidden))
    # What folders say is a text, whatever the table's type is.
    others = pa.schema([field for field in found.columns if field.name not in folders])
    condition = keeps.left_of("")  # all of it
    where = f"{shown(address)}: {found.version}"
    try:
        check_schema(where, "", others, needs, folders)
        if not isinstance(condition, bool):
            check_filter(where, "", condition, others, folders)
    except UnusableFile as error:
        raise InputError(str(error)) from error


def open_rows(
    path: AnyPath, stamp: tuple[int, ...], lines: Mapping[str, str]
) -> AbstractContextManager[pq.ParquetFile]:
    """The open file with the rows of the source `path`: itself, or what `lines` says is stored."""
    return open_parquet(Path(lines["stored"])) if lines else open_parquet(path, stamp=stamp)


def read_footer(path: AnyPath, file: pq.ParquetFile) -> tuple[list[int], dict[str, Any]]:
    """The rows of each row group of an open file, and the fields of how it is written."""
    check_carried(str(path), file)
    metadata = file.metadata
    check_chunks(file)
    group_rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    # A damaged footer may contradict itself; pyarrow does not compare the two numbers.
    if sum(group_rows) != metadata.num_rows:
        raise UnusableFile(
            f"{shown(path)}: its row groups hold {sum(group_rows)} rows, its footer says "
            f"{metadata.num_rows}. Replace the file."
        )
    return group_rows, {"form": written_form(file), "int96": "us" if has_int96(file) else ""}


@dataclass(frozen=True, slots=True)
class LinesFile:
    """A file of lines: how it is read, and its stamp and digest when it was planned."""

    path: AnyPath
    form: Form
    stamp: tuple[int, ...]
    digest: str


def stored_fields(file: LinesFile, cache: str, wanted: AbstractSet[str]) -> dict[str, str]:
    """Store the rows of a file of lines in `cache`; the fields of a fragment that say so.

    If no line can be read, the file has no columns: those `wanted` are null in all rows.
    """
    stored = stored_lines(cache, file.digest, file.form)
    store_lines(file.path, file.form, stored, file.stamp, file.digest)
    with open_parquet(stored) as opened:
        has_columns = len(opened.schema_arrow) > len(OWN_FIELDS)
    if has_columns or file.form.columns or not wanted:
        return {"reading": file.form.as_text(), "stored": str(stored)}
    form = file.form.model_copy(update={"columns": tuple(sorted(wanted))})
    return stored_fields(replace(file, form=form), cache, wanted)


def file_digest(path: AnyPath, look: Look) -> str:
    """The digest of the bytes that have the stamp of `look`. UnusableFile if they were replaced."""
    # Reading a pipe would wait for its writer. In a store there is none.
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise UnusableFile(f"{shown(path)}: is a folder, pipe or device where a file is expected.")
    with readable(path):
        return digest_file(path, look.stamp)
