"""Folders that are tables of another format: files lie in them that count no longer, or not yet.

Which files count is written beside them. Reading all as Parquet would answer deleted and replaced
rows too. Knows such a table by names alone.
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

# A name in the table's folder, what the table is, which names below that name make it one, and how
# one of these begins in each such table. A data file of Iceberg belongs to a snapshot.
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
# Keys that are looked at for each beginning. Folders above an input in a store may hold millions
# under such a name, and what makes a table is among the first.
MOST_KEYS = 100


def refuse_table(folder: AnyPath, table: tuple[str, str] | None, setting: str) -> None:
    """InputError if there is a `table` (mark, kind) in `folder`, which `setting` led to."""
    if table is not None:
        mark, kind = table
        raise InputError(
            f"{shown(folder)}: is {kind} ({mark}), whose files hold deleted and replaced rows too. "
            f"Write its rows as they are now to a folder of their own, and set {setting} to it."
        )


def refuse_tables_above(folder: AnyPath, setting: str, *, itself: bool = True) -> None:
    """InputError if a folder that holds `folder`, or `itself`, is a table of another format."""
    if isinstance(folder, Path):
        whole = Path(os.path.abspath(folder))
        real = Path(os.path.realpath(folder))
        folders: Sequence[AnyPath] = [*whole.parents, *real.parents, *([whole] if itself else [])]
    else:
        # The last two are the scheme, and no name at all.
        folders = [*([folder] if itself else []), *folder.parents][:-2]
    places = []
    for place in dict.fromkeys(folders):
        places += [(place, mark) for mark in MARKS]
    found = Folder(folder).map(lambda place: _table(*place), places)
    for (place, _), table in zip(places, found, strict=True):
        refuse_table(place, table, setting)


def table_of(folder: AnyPath) -> tuple[str, str] | None:
    """The mark and the kind of the table that `folder` is; None when it is none."""
    tables = (_table(folder, mark) for mark in MARKS)
    return next((table for table in tables if table), None)


def _table(folder: AnyPath, mark: str) -> tuple[str, str] | None:
    """The mark and the kind of the table that `mark` makes of `folder`; None when none."""
    if any(is_mark(mark, name) for name in _below(folder, mark)):
        return mark, MARKS[mark][0]
    return None


def is_mark(mark: str, name: str) -> bool:
    """Whether `name` below the name `mark` makes the folder of `mark` a table."""
    return mark in MARKS and re.fullmatch(MARKS[mark][1], name) is not None


def _below(folder: AnyPath, mark: str) -> Iterable[str]:
    """Names below `mark` in `folder`; an empty one where it stands alone."""
    if isinstance(folder, Path):
        place = folder / mark
        if os.path.lexists(place):
            yield ""
            with suppress(OSError):  # what cannot be looked into, or is no folder
                yield from os.listdir(place)
        return
    beginnings = MARKS[mark][2]
    # Who may read a folder may not always list the ones above it.
    with suppress(StoreRefused):
        for prefix in [mark] if beginnings is None else [f"{mark}/{name}" for name in beginnings]:
            for key in folder.keys(prefix, MOST_KEYS):
                first, _, rest = key.partition("/")
                if first == mark:
                    yield rest


def first_table(names: Iterable[str]) -> tuple[str, tuple[str, str]] | None:
    """The folder of the first table that objects of these `names` show, and what it is."""
    for name in names:
        for place, part in enumerate(parts := name.split("/")):
            if is_mark(part, "/".join(parts[place + 1 :])):
                return str(PurePosixPath(*parts[:place])), (part, MARKS[part][0])
            if is_hidden(part):
                break  # nothing below is read
    return None
