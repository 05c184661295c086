"""What an input names: its files, and the version of the table that they belong to. Opens none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.paths import AnyPath
from glmbatch.store.tables.bounds import ColumnBounds


@dataclass(frozen=True, slots=True)
class Skipped:
    """The number of names of an input that are not read for one `reason`, and the first name."""

    reason: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"{self.count:,} {self.reason} (for example {self.first})"


@dataclass(frozen=True, slots=True)
class Version:
    """The version of a table that a run reads: a version of Delta Lake, a snapshot of Iceberg.

    An Iceberg table has a `name`, by which a catalogue knows it, and a `schema_id`: its columns can
    change without a new snapshot. `hidden` are names in its folders, such as part in part=1, that
    are no columns of it.
    """

    format: Literal["Delta", "Iceberg"]
    number: int
    name: str = ""
    schema_id: int | None = None
    hidden: tuple[str, ...] = ()

    def __str__(self) -> str:
        noun = "version" if self.format == "Delta" else "snapshot"
        return f"{noun} {self.number} of the {self.format} table"


@dataclass(frozen=True, slots=True)
class Found:
    """The files that an input names, as sorted POSIX paths below the folder `root`.

    `kind` says what the input itself is. `stamps` are the files' own (see `version_stamp`) when
    they were found, and `links` those files that are links. `refused` maps files that cannot be
    read because of their names to the reason. `skipped` counts the names that are not input files.

    Of a table they are the files of one `version`, which never change. Their stamps are what the
    table itself says of them: size and time. `columns` are those of the table that may come from
    files (see `table_columns`), and `unsaid` maps names in a file's folders that do not say what
    the table says to the value that it has. `bounds` are what the table says of the values of some
    columns, in the order of `names`.
    """

    root: AnyPath
    kind: Literal["file", "folder", "glob", "table"]
    names: list[str]
    stamps: dict[str, tuple[int, ...]]
    links: frozenset[str]
    refused: dict[str, str]
    skipped: list[Skipped]
    version: Version | None = None
    columns: pa.Schema | None = None
    unsaid: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    bounds: Mapping[str, ColumnBounds] = field(default_factory=dict)

    def given(self, name: str) -> dict[str, str | None]:
        """The columns that the folders of the file `name` give, with their values.

        Of a table, only where they say what the table says.
        """
        return folder_columns(name, self.unsaid.get(name, ()))


def given_columns(name: str, version: Version | None) -> dict[str, str | None]:
    """The columns that the folders of the file `name` give; of a table, only its own columns."""
    return folder_columns(name, () if version is None else version.hidden)
