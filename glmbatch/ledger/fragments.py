"""Find the input's files, check them against the job, and cut them into fragments.

A fragment is a row range of one file: the unit of work, of retry and of commit. It is named by the
file's path below the input and its first row, so adding files renames no fragment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel

from glmbatch.errors import InputError, UnusableFile, shown
from glmbatch.settings.job import DataConfig
from glmbatch.store.files import (
    DIGEST_CHARS,
    digest_file,
    exists,
    naming,
    real_path,
    stamp_file,
    telling_size,
    too_long,
    whole_name,
)
from glmbatch.store.footers import written_form
from glmbatch.store.inputs.find import Skipped, find_files
from glmbatch.store.inputs.needs import SchemaNeeds, check_schema, from_folders
from glmbatch.store.inputs.nesting import refuse_nesting, refuse_reach
from glmbatch.store.parquet import (
    TimeUnit,
    open_parquet,
    read_rows,
    readable,
    with_constants,
)
from glmbatch.store.paths import AnyPath
from glmbatch.store.types import check_carried, has_int96


class Fragment(BaseModel, frozen=True, extra="forbid"):
    """A range of rows of one file, from `first_row`, and the row groups that hold them.

    - `source` is the file's path below the input, `path` its whole path or address.
    - `skip_rows` rows of the first row group belong to the fragment before.
    - `digest` is the SHA-256 of the whole file. `stamp` is its size in bytes and its modification
      time in nanoseconds (in a store, a number made from its ETag) at planning.
    - `form` is not empty if the output stores a column in another type than the file.
    - `typed` holds the types that a Delta table gives to columns without one (see `typed_text`).
    - `partitions` are the columns that the job reads from folder names such as `day=1`.
    - `int96` is the unit in which INT96 times are read and written; empty if the file has none.
    """

    source: str
    path: str
    digest: str
    stamp: tuple[int, int]
    first_row: int
    rows: int
    row_groups: tuple[int, ...]
    skip_rows: int
    form: str = ""
    typed: str = ""
    int96: Literal["", "us", "ns"] = ""
    partitions: tuple[tuple[str, str | None], ...] = ()

    @property
    def name(self) -> str:
        """The source and the first row, unique within the input."""
        return f"{self.source}@{self.first_row}"

    @property
    def unit(self) -> TimeUnit:
        """The unit in which the file's INT96 times are read."""
        return self.int96 or "us"

    @property
    def output_name(self) -> str:
        """The path of the fragment's file below the output."""
        return output_name(self.source, self.first_row)


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


class Plan(BaseModel, frozen=True, extra="forbid"):
    """All fragments of a run, file by file, and the files that cannot be used.

    Sources are paths below the folder `root`. `skipped` are names below the input that are no input
    files, such as hidden ones. `limit` is `data.limit`, in rows.
    """

    root: str
    fragments: tuple[Fragment, ...]
    unusable: tuple[FileFault, ...]
    limit: int | None = None
    skipped: tuple[Skipped, ...] = ()

    @property
    def rows(self) -> int:
        """The number of rows in all fragments."""
        return sum(fragment.rows for fragment in self.fragments)


def plan_fragments(
    data: DataConfig, needs: SchemaNeeds, *, raise_faults: bool = False, digests: bool = True
) -> Plan:
    """Check every file of the input against the job's `needs`, and cut it into fragments.

    Fragments are in the order of file names, then of rows. Without `digests` only footers are read.
    Files that cannot be used are listed in the plan; with `raise_faults`, the first one raises
    UnusableFile. InputError when no file can be used, or when two files would have the same output
    file.
    """
    found = find_files(data.input, follow_links=data.follow_links)
    root, names = found.root, found.names
    refuse_nesting(found, data.input, data.output)
    ranges: list[Fragment] = []
    faults = []
    for name, reason in found.refused.items():
        if raise_faults:
            raise UnusableFile(reason)
        faults.append(FileFault(source=shown(name), reason=reason))
    for name, outcome in zip(names, _each_file(root, names, data, needs, digests), strict=True):
        if isinstance(outcome, list):
            ranges += outcome
        elif raise_faults:
            raise outcome
        else:
            faults.append(_fault(root, name, outcome))
    if not ranges:
        raise none_usable(shown(data.input), faults)
    _refuse_same_output(ranges)
    refuse_reach(data.input, data.output, (fragment.output_name for fragment in ranges))
    return Plan(
        root=whole_name(root),
        fragments=tuple(_limited(ranges, data.limit)),
        unusable=tuple(faults),
        limit=data.limit,
        skipped=tuple(found.skipped),
    )


def none_usable(where: str, faults: Sequence[FileFault]) -> InputError:
    """The error to raise when every file of an input is left out."""
    return InputError(
        f"{where}: none of {len(faults)} files can be used; the first: {faults[0].reason}"
    )


def _fault(root: AnyPath, name: str, error: UnusableFile) -> FileFault:
    """The record of a file `name` that is left out because of `error`."""
    size_bytes = 0 if error.rows is not None else telling_size(root / name)
    reason = shown(error)
    return FileFault(source=name, reason=reason, size_bytes=size_bytes, rows=error.rows)


def _each_file(
    root: AnyPath, names: list[str], data: DataConfig, needs: SchemaNeeds, digests: bool
) -> Iterator[list[Fragment] | UnusableFile]:
    """The fragments of each file in order, or why it cannot be used. Digests files in parallel."""
    given = real_path(data.input if exists(data.input) else root)

    def outcome(name: str) -> list[Fragment] | UnusableFile:
        try:
            with naming("data.input"):
                ranges = _fragments_of(root, name, given, data, needs)
                digest = _digest(root / name) if digests else ""
        except UnusableFile as error:
            return error
        return [fragment.model_copy(update={"digest": digest}) for fragment in ranges]

    # SHA-256 releases Python's lock, so four threads digest as fast as a disk reads.
    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(outcome, names)


def _refuse_same_output(ranges: list[Fragment]) -> None:
    # For example a.parquet and a, which one glob may match.
    sources: dict[str, str] = {}
    for fragment in ranges:
        first = sources.setdefault(fragment.output_name, fragment.source)
        if first != fragment.source:
            raise InputError(
                f"{first} and {fragment.source} would both be written to {fragment.output_name}. "
                "Rename one, or set data.input to leave it out."
            )


def _fragments_of(
    root: AnyPath, name: str, given: AnyPath, data: DataConfig, needs: SchemaNeeds
) -> list[Fragment]:
    """The fragments of one file. UnusableFile if it is a link that leads out of `given`."""
    path = root / name
    if not data.follow_links and not real_path(path).is_relative_to(given):
        raise UnusableFile(
            f"{shown(path)}: is a link that leads out of the input. Copy the file, or set "
            "data.follow_links if you trust everyone who can write there."
        )
    # Before the footer, so that `read_fragment` detects every later change.
    with readable(path):
        stamp = stamp_file(path)
    schema, group_rows, written = _read_footer(path)
    try:
        check_schema(path, name, schema, needs)
        _check_output_name(name, data)
    except UnusableFile as error:
        error.rows = sum(group_rows)
        raise
    partitions = from_folders(name, [needed.name for needed in needs.read], schema)
    return [
        Fragment(
            source=name,
            path=str(path),
            digest="",
            stamp=stamp,
            first_row=first_row,
            rows=rows,
            row_groups=row_groups,
            skip_rows=skip_rows,
            partitions=partitions,
            **written,
        )
        for first_row, rows, row_groups, skip_rows in cut(group_rows, data.rows_per_fragment)
    ]


def _read_footer(path: AnyPath) -> tuple[pa.Schema, list[int], dict[str, Any]]:
    """The columns of a file, the rows of each row group, and the fields of how it is written."""
    with open_parquet(path) as file:
        check_carried(str(path), file)
        metadata = file.metadata
        group_rows = [
            metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)
        ]
        # A damaged footer may contradict itself; pyarrow does not compare the two numbers.
        if sum(group_rows) != metadata.num_rows:
            raise UnusableFile(
                f"{shown(path)}: its row groups hold {sum(group_rows)} rows, its footer says "
                f"{metadata.num_rows}. Replace the file."
            )
        written = {"form": written_form(file), "int96": "us" if has_int96(file) else ""}
        return file.schema_arrow, group_rows, written


def _check_output_name(name: str, data: DataConfig) -> None:
    """UnusableFile when the output file of `name` would have a name that is too long."""
    longest = output_name(name, 0)
    if data.format == "delta":
        longest = f"{longest}.{DIGEST_CHARS * '0'}"  # as run/publish.py adds it
    if problem := too_long(data.output, longest):
        raise UnusableFile(f"{shown(name)}: the name of its output {problem}. Rename the file.")


def read_fragment(
    fragment: Fragment, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of `fragment` in order, as batches of all columns or only `columns`.

    Columns of folder names come only if named in `columns`. UnusableFile when the rows cannot be
    read, or, after the last batch, when the file changed since it was planned.
    """
    given = {name: value for name, value in fragment.partitions if name in (columns or ())}
    stored = None if columns is None else [name for name in columns if name not in given]
    rows = (fragment.row_groups, fragment.skip_rows, fragment.rows)
    for batch in read_rows(fragment.path, *rows, stored, int96=fragment.unit):
        yield with_constants(batch, given)
    # Checked last, so that a change during the reading is detected too.
    with readable(fragment.path):
        if stamp_file(fragment.path) != fragment.stamp:
            raise UnusableFile(
                f"{fragment.path}: was changed while the run read it. Run again when it is "
                "complete."
            )


def cut(
    group_rows: list[int], rows_per_fragment: int
) -> Iterator[tuple[int, int, tuple[int, ...], int]]:
    """Cut row groups of the given sizes into ranges, in order.

    A range is (first row, rows, row groups, rows to skip in the first group).

    Whole row groups are joined up to `rows_per_fragment`, so that none is read twice. Only a row
    group that is larger is cut. A file without rows gives one empty range, so that it has a file in
    the output.
    """
    first_row = 0
    pending: list[int] = []
    pending_rows = 0
    for group, size in enumerate(group_rows):
        if pending and pending_rows + size > rows_per_fragment:
            yield first_row, pending_rows, tuple(pending), 0
            first_row += pending_rows
            pending = []
            pending_rows = 0
        if size > rows_per_fragment:
            for skip in range(0, size, rows_per_fragment):
                yield first_row + skip, min(rows_per_fragment, size - skip), (group,), skip
            first_row += size
        elif size:
            pending.append(group)
            pending_rows += size
    if pending or not first_row:
        yield first_row, pending_rows, tuple(pending), 0


def _digest(path: AnyPath) -> str:
    with readable(path):
        return digest_file(path)


def _limited(ranges: list[Fragment], limit: int | None) -> Iterator[Fragment]:
    missing = sum(fragment.rows for fragment in ranges) if limit is None else limit
    for fragment in ranges:
        if limit is not None and not missing:
            return
        yield (
            fragment if fragment.rows <= missing else fragment.model_copy(update={"rows": missing})
        )
        missing -= min(missing, fragment.rows)
