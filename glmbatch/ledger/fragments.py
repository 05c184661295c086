"""Fragments, the plan that has them, and how their rows are read. See input/ for their making.

A fragment is a row range of one file: the unit of work, of retry and of commit. It is named by the
file's path below the input and its first row, so adding files renames no fragment.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, field_serializer

from glmbatch.errors import GlmbatchError, InputError, counted
from glmbatch.store.files import refuse_change
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.found import Skipped, Version
from glmbatch.store.lines.form import Form
from glmbatch.store.lines.stored import store_lines
from glmbatch.store.parquet import TimeUnit, open_parquet, read_opened, readable, with_constants
from glmbatch.store.paths import AnyPath
from glmbatch.store.tables.fitting import columns_in_file, fitted_fields, fitted_rows
from glmbatch.store.types import take_rows

VARYING = re.compile(r"\[.*\]|'[^']*'|\d+")  # of a reason: what differs between files of one kind
MAGIC = b"PAR1"  # begins every Parquet file that is not encrypted


class Fragment(BaseModel, frozen=True, extra="forbid"):
    """A range of rows of one file, from `first_row`, and the row groups that hold them.

    - `source` is the file's path below the input, `path` its whole path or address.
    - `skip_rows` rows of the first row group belong to the fragment before.
    - `digest` is the SHA-256 of the whole file, `stamp` its `version_stamp` at planning. Receipts
      record the first two numbers of the stamp: the others mean nothing on another disk.
    - `form` is not empty if the output stores a column in another type than the file.
    - `typed` holds the types that a Delta table gives to columns without one (see `typed_text`).
    - `partitions` are the columns that the job reads from folder names such as `day=1`.
    - `int96` is the unit in which INT96 times are read and written; empty if the file has none.
    - `columns` are those that go out, sorted; empty if all do.
    - `fitted` has the columns of the file's table that the file lacks, or has in narrower types or
      under other names, as text (see store/tables/fitting.py).
    - `where` is the condition on the rows of the file; empty if it has none. If some rows do not
      meet it, the fragment covers `span` rows of the file and has `rows` of them: `picked` says
      which (see `packed`), and its row groups are those that have one.
    - `reading` says how a file of lines is read (see `Form`), and `stored` where its rows are as
      Parquet, while the cache has them. Both are empty for a Parquet file.
    """

    source: str
    path: str
    digest: str
    stamp: tuple[int, ...]
    first_row: int
    rows: int
    row_groups: tuple[int, ...]
    skip_rows: int
    form: str = ""
    typed: str = ""
    int96: Literal["", "us", "ns"] = ""
    partitions: tuple[tuple[str, str | None], ...] = ()
    columns: tuple[str, ...] = ()
    reading: str = ""
    stored: str = ""
    fitted: str = ""
    where: str = ""
    span: int = 0
    picked: str = ""

    @field_serializer("stamp", when_used="json")
    def _recorded(self, stamp: tuple[int, ...]) -> tuple[int, ...]:
        return stamp[:2]

    @property
    def name(self) -> str:
        """The source and the first row, unique within the input."""
        return f"{self.source}@{self.first_row}"

    def has_out(self, column: str) -> bool:
        """Whether a column of the source goes out."""
        return not self.columns or column in self.columns

    @property
    def covered(self) -> int:
        """The number of rows of the source, from `first_row`, that have a place here or none."""
        return self.span or self.rows

    @property
    def numbers(self) -> np.ndarray:
        """The number in the source of each row."""
        if not self.span:
            return np.arange(self.first_row, self.first_row + self.rows)
        return self.first_row + _unpacked(self.picked, self.span)[: self.rows]

    @property
    def unit(self) -> TimeUnit:
        """The unit in which the file's INT96 times are read."""
        return self.int96 or "us"

    @property
    def output_name(self) -> str:
        """The path of the fragment's file below the output."""
        return output_name(self.source, self.first_row)


def packed(picked: np.ndarray, span: int) -> str:
    """Which of `span` rows are `picked`, by their numbers: a compressed bit for each, as text."""
    mask = np.zeros(span, bool)
    mask[picked] = True
    return b64encode(zlib.compress(np.packbits(mask).tobytes())).decode()


@lru_cache(16)
def _unpacked(picked: str, span: int) -> np.ndarray:
    bits = np.frombuffer(zlib.decompress(b64decode(picked)), np.uint8)
    return np.flatnonzero(np.unpackbits(bits, count=span))


def bundle_name(fragments: Sequence[str]) -> str:
    """Fragments that share tasks, for people: the name of the first, and how many more."""
    others = len(fragments) - 1
    return fragments[0] + (f" and {counted(others, 'more fragment')}" if others else "")


def output_name(source: str, first_row: int) -> str:
    """The path below the output of the file with the rows of `source` from `first_row` on."""
    path = PurePosixPath(source)
    return str(path.parent / f"{path.name.removesuffix('.parquet')}-{first_row:010d}.parquet")


class FileFault(BaseModel, frozen=True, extra="forbid"):
    """A file that a run leaves out, or only its fragment from `first_row` on, and the reason.

    `max_error_rate` counts its rows: `rows` is their number if the footer could be read. Otherwise
    they are estimated from `size_bytes`, which is 0 if the size says nothing about them.
    """

    source: str
    reason: str
    first_row: int | None = None
    size_bytes: int = 0
    rows: int | None = None


def none_usable(where: str, faults: Sequence[FileFault]) -> InputError:
    """The error to raise when every file of an input is left out, with the most frequent reason."""
    kinds: dict[str, list[FileFault]] = {}
    for fault in faults:
        reason = fault.reason.partition(f"{fault.source}: ")[2] or fault.reason
        kinds.setdefault(VARYING.sub("", reason), []).append(fault)
    most = max(kinds.values(), key=len)
    which = "the first" if len(most) in (1, len(faults)) else f"{len(most)} of them like"
    return InputError(
        f"{where}: none of {len(faults)} files can be used; {which}: {most[0].reason}"
    )


def telling_size(path: AnyPath) -> int:
    """The size in bytes of an unusable file, if it says something about the number of rows; else 0.

    The size of a truncated Parquet file does. Those of a pointer to a large file, of an error page
    or of a file of unwritten blocks do not.
    """
    try:
        if not path.is_file() or path.stat().st_size <= len(MAGIC):
            return 0
        with path.open("rb") as file:
            return path.stat().st_size if file.read(len(MAGIC)) == MAGIC else 0
    except (OSError, GlmbatchError):  # the file has disappeared or cannot be read
        return 0


class Plan(BaseModel, frozen=True, extra="forbid"):
    """All fragments of a run, file by file, and the files that cannot be used.

    Sources are paths below the folder `root`. `skipped` are names below the input that are no input
    files, such as hidden ones. `limit` is `data.limit`, in rows. `where` is the condition on rows,
    which left out all rows of the sources `left_out`.

    - `unchanged` sources are published and make no fragment. `stamps` are those of all others. A
      stamp is empty if a later write might leave it as it is.
    - Of a table, they are the files of one `version`, and `columns` says which columns it has.
    - `rechecked` unchanged sources were digested again by chance. `silent` ones had other bytes
      under the same stamp, so they are planned.
    """

    root: str
    fragments: tuple[Fragment, ...]
    unusable: tuple[FileFault, ...]
    limit: int | None = None
    skipped: tuple[Skipped, ...] = ()
    unchanged: dict[str, tuple[int, ...]] = {}
    stamps: dict[str, tuple[int, ...]] = {}
    rechecked: int = 0
    silent: tuple[str, ...] = ()
    where: str | None = None
    left_out: tuple[str, ...] = ()
    version: Version | None = None
    columns: str = ""

    @property
    def rows(self) -> int:
        """The number of rows in all fragments."""
        return sum(fragment.rows for fragment in self.fragments)


def open_fragment(fragment: Fragment) -> AbstractContextManager[pq.ParquetFile]:
    """The open file of `fragment`. UnusableFile if it is not the one that was planned."""
    if fragment.reading:
        form = Form.model_validate_json(fragment.reading)
        stored, path = Path(fragment.stored), Folder(fragment.path).path
        store_lines(path, form, stored, fragment.stamp, fragment.digest)
        return open_parquet(stored)
    return open_parquet(fragment.path, fragment.unit, fragment.stamp, fragment.digest)


def read_fragment(
    fragment: Fragment, columns: Sequence[str] | None = None, *, whole: bool = False
) -> Iterator[pa.RecordBatch]:
    """The rows of `fragment` in order, as batches of all columns or only `columns`.

    Columns of folder names come only if named in `columns`. With `whole`, the other columns that go
    out are decoded too, so that damage in them is found. UnusableFile when the rows cannot be read,
    or, after the last batch, when the file changed since it was planned.
    """
    given = {name: value for name, value in fragment.partitions if name in (columns or ())}
    stored = None if columns is None else [name for name in columns if name not in given]
    if fragment.rows:
        # Here and last: a file that is replaced, and put back while it is read, shows only here.
        with open_fragment(fragment) as file:
            read = stored
            if whole:
                names = [field.name for field in fitted_fields(file.schema_arrow, fragment.fitted)]
                read = [name for name in names if fragment.has_out(name) or name in (stored or ())]
            read = None if read is None else columns_in_file(read, fragment.fitted)
            for batch in _read(fragment, file, read):
                rows = fitted_rows(batch, fragment.fitted, stored)
                yield with_constants(rows if stored is None else rows.select(stored), given)
    with readable(fragment.path):
        refuse_change(fragment.path, fragment.stamp, digest=fragment.digest)


def _read(
    fragment: Fragment, file: pq.ParquetFile, columns: Sequence[str] | None
) -> Iterator[pa.RecordBatch]:
    """The rows of `fragment` in its open file, whose footer was checked when it was planned."""
    if not fragment.span:
        rows = (fragment.row_groups, fragment.skip_rows, fragment.rows)
        yield from read_opened(file, *rows, columns=columns, where=fragment.path, checked=True)
        return
    places = _places(fragment, file)
    rows = (fragment.row_groups, 0, int(places[-1]) + 1)
    begin = 0
    for batch in read_opened(file, *rows, columns=columns, where=fragment.path, checked=True):
        within = places[(places >= begin) & (places < begin + batch.num_rows)] - begin
        if len(within):
            yield take_rows(batch, within)
        begin += batch.num_rows


def _places(fragment: Fragment, file: pq.ParquetFile) -> np.ndarray:
    """Where each row is among all rows of the fragment's row groups."""
    metadata = file.metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    numbers = fragment.numbers
    places = []
    before = 0
    for group in fragment.row_groups:
        within = numbers[(numbers >= starts[group]) & (numbers < starts[group + 1])]
        places.append(within - starts[group] + before)
        before += sizes[group]
    return np.concatenate(places)
