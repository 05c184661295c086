"""Detect folders that are tables of another format (Delta, Hudi, Iceberg, Paimon, Spark streams).

Such a table has files whose rows were deleted or replaced; its own metadata says which files count.
Reading all of them as Parquet would also answer the old rows. Looks only at names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from glmbatch.errors import InputError, StoreRefused, shown
from glmbatch.store.folder import Folder
from glmbatch.store.paths import AnyPath, is_hidden

# For each mark, a name in a table's folder: the kind of table, the pattern of names below the mark,
# and their prefixes. Every such table has a name below the mark that matches the pattern and begins
# with a prefix; None if the mark itself is enough. Each Iceberg data file belongs to a snapshot.
MARKS = {
    "_delta_log": ("a Delta table", ".*", ("",)),
    ".hoodie": ("a Hudi table", ".*", ("",)),
    ".hoodie_partition_metadata": ("a part of a Hudi table", "", None),
    "metadata": (
        "an Iceberg table",
        r".*\.metadata\.json(\.gz)?|snap-.*\.avro",
        ("snap-", "0000", "v1"),
    ),
    "snapshot": ("a Paimon table", r"snapshot-\d+", ("snapshot-",)),
    "_spark_metadata": ("an output of a Spark stream", ".*", ("",)),
}
# The marks of tables that a run reads (see store/tables/), and how they are named.
READ = {"_delta_log": "this folder", "metadata": "iceberg:CATALOG/namespace.name"}
# At most this many keys are listed for each prefix. A folder above an input in a store may have
# millions of them, and the ones that make it a table are among the first.
MOST_KEYS = 100


def refuse_table(folder: AnyPath, table: tuple[str, str] | None, setting: str) -> None:
    """InputError if `table` (mark, kind) is not None; `setting` led to the `folder` it is in."""
    if table is not None:
        mark, kind = table
        way = f"Export its current rows to a separate folder, and set {setting} to that."
        if mark in READ:
            way = f"Set {setting} to {READ[mark]}, or export its current rows to a separate folder."
        raise InputError(
            f"{shown(folder)}: is {kind} ({mark}), whose files hold deleted and replaced rows too. "
            f"{way}"
        )


def refuse_tables_above(folder: AnyPath, setting: str, *, itself: bool = True) -> None:
    """InputError if a folder above `folder`, or `itself`, is a table of another format."""
    if isinstance(folder, Path):
        whole = Path(os.path.abspath(folder))
        real = Path(os.path.realpath(folder))
        folders: Sequence[AnyPath] = [*whole.parents, *real.parents, *([whole] if itself else [])]
    else:
        # Without the last two parents: the scheme and the empty path.
        folders = [*([folder] if itself else []), *folder.parents][:-2]
    places = []
    for place in dict.fromkeys(folders):
        places += [(place, mark) for mark in MARKS]
    found = Folder(folder).map(lambda place: _table(*place), places)
    for (place, _), table in zip(places, found, strict=True):
        refuse_table(place, table, setting)


def table_of(folder: AnyPath) -> tuple[str, str] | None:
    """The mark and the kind of the table that `folder` is; None if it is not a table."""
    tables = (_table(folder, mark) for mark in MARKS)
    return next((table for table in tables if table), None)


def is_marked(folder: AnyPath, mark: str) -> bool:
    """Whether `mark` makes `folder` a table."""
    return _table(folder, mark) is not None


def _table(folder: AnyPath, mark: str) -> tuple[str, str] | None:
    """`mark` and the kind of the table, if `mark` makes `folder` a table; else None."""
    if any(is_mark(mark, name) for name in _below(folder, mark)):
        return mark, MARKS[mark][0]
    return None


def is_mark(mark: str, name: str) -> bool:
    """Whether `name`, below `mark`, makes the folder that contains `mark` a table."""
    return mark in MARKS and re.fullmatch(MARKS[mark][1], name) is not None


def _below(folder: AnyPath, mark: str) -> Iterable[str]:
    """The names below `mark` in `folder`, and an empty name for `mark` itself."""
    if isinstance(folder, Path):
        place = folder / mark
        if os.path.lexists(place):
            yield ""
            with suppress(OSError):  # not a folder, or not readable
                yield from os.listdir(place)
        return
    beginnings = MARKS[mark][2]
    # A user who may read a folder may not be allowed to list the folders above it.
    with suppress(StoreRefused):
        for prefix in [mark] if beginnings is None else [f"{mark}/{name}" for name in beginnings]:
            for key in folder.keys(prefix, MOST_KEYS):
                first, _, rest = key.partition("/")
                if first == mark:
                    yield rest


def first_table(names: Iterable[str]) -> tuple[str, tuple[str, str]] | None:
    """The first table among objects with these `names`: its folder, and (mark, kind)."""
    for name in names:
        for place, part in enumerate(parts := name.split("/")):
            if is_mark(part, "/".join(parts[place + 1 :])):
                return str(PurePosixPath(*parts[:place])), (part, MARKS[part][0])
            if is_hidden(part):
                break  # nothing below a hidden name is read
    return None
