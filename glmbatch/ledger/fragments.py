"""Which files there are, whether the job fits them, and how they are cut into fragments.

A fragment is a row range of one file: the unit of work, of retry and of commit. Its name is the
file's path below the input and its first row, so new files rename nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
from pydantic import BaseModel

from glmbatch.errors import InputError, UnusableFile
from glmbatch.settings.job import DataConfig
from glmbatch.store.files import digest_file, exists, find_files, naming, real_path, stamp_file
from glmbatch.store.footers import written_form
from glmbatch.store.parquet import (
    TimeUnit,
    check_column,
    int96_unit,
    open_parquet,
    read_rows,
    readable,
)
from glmbatch.store.paths import AnyPath
from glmbatch.store.types import check_carried


class Fragment(BaseModel, frozen=True, extra="forbid"):
    """Rows `first_row` to `first_row + rows` of one file, and the row groups that hold them.

    `skip_rows` of the first row group belong to the fragment before. `digest` is that of the whole
    file, `stamp` its size in bytes and time of change in nanoseconds (in a store: the number of its
    ETag) when it was planned. `form` says that the output has some column otherwise than the file,
    `typed` which types a Delta table gives to columns without one, as Arrow writes a schema.
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

    @property
    def name(self) -> str:
        return f"{self.source}@{self.first_row}"

    @property
    def output_name(self) -> str:
        """Path of the fragment's file below the output."""
        source = PurePosixPath(self.source)
        return str(
            source.parent / f"{source.name.removesuffix('.parquet')}-{self.first_row:010d}.parquet"
        )


class FileFault(BaseModel, frozen=True, extra="forbid"):
    """A file that this run leaves out, or the fragment of it from `first_row` on, and why."""

    source: str
    reason: str
    first_row: int | None = None
    size_bytes: int = 0


class Plan(BaseModel, frozen=True, extra="forbid"):
    """All fragments of a run, file by file, and the files that cannot be used.

    Sources are named from the folder `root`.
    """

    root: str
    fragments: tuple[Fragment, ...]
    unusable: tuple[FileFault, ...]
    limit: int | None = None

    @property
    def rows(self) -> int:
        return sum(fragment.rows for fragment in self.fragments)


@dataclass(frozen=True, slots=True)
class NeededColumn:
    """A column that a job reads, and the setting that names it; `is_text` if it must hold text."""

    name: str
    setting: str
    is_text: bool


@dataclass(frozen=True, slots=True)
class SchemaNeeds:
    """What a job asks of each file's schema.

    `read` are the columns it reads, `written` the step of each column that it writes.
    """

    read: tuple[NeededColumn, ...]
    written: Mapping[str, str]


def plan_fragments(
    data: DataConfig, needs: SchemaNeeds, *, raise_faults: bool = False, digests: bool = True
) -> Plan:
    """Check every file of the input against the job's `needs` and cut it into fragments.

    InputError when the job fits no file or an answer's name collides, or, with `raise_faults`, when
    any file cannot be used; else such files are listed in the plan. Without `digests` nothing but
    footers is read.
    """
    root, names = find_files(data.input)
    _refuse_nesting(root, names, data)
    ranges: list[Fragment] = []
    faults: list[FileFault] = []
    for name, outcome in zip(names, _each_file(root, names, data, needs, digests), strict=True):
        if isinstance(outcome, list):
            ranges += outcome
        elif raise_faults:
            raise outcome
        else:
            # For the error budget, which cannot ask a damaged footer for its rows.
            size_bytes = (root / name).stat().st_size if (root / name).exists() else 0
            faults.append(FileFault(source=name, reason=str(outcome), size_bytes=size_bytes))
    if not ranges:
        raise InputError(
            f"{data.input}: none of {len(names)} files can be used; the first: {faults[0].reason}"
        )
    _refuse_same_output(ranges)
    fragments = tuple(_limited(ranges, data.limit))
    return Plan(
        root=str(root.resolve()), fragments=fragments, unusable=tuple(faults), limit=data.limit
    )


def _each_file(
    root: AnyPath, names: list[str], data: DataConfig, needs: SchemaNeeds, digests: bool
) -> Iterator[list[Fragment] | UnusableFile]:
    """The fragments of each file, or why it cannot be used; digests are taken side by side."""
    given = real_path(data.input if exists(data.input) else root)

    def outcome(name: str) -> list[Fragment] | UnusableFile:
        try:
            with naming("data.input"):
                ranges = _fragments_of(root, name, given, data.rows_per_fragment, needs)
                digest = _digest(root / name) if digests else ""
        except UnusableFile as error:
            return error
        return [fragment.model_copy(update={"digest": digest}) for fragment in ranges]

    # SHA-256 frees Python's lock, so four threads digest as fast as a disk reads.
    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(outcome, names)


def _refuse_same_output(ranges: list[Fragment]) -> None:
    # Such as a.parquet and a, which a glob may both name.
    sources: dict[str, str] = {}
    for fragment in ranges:
        first = sources.setdefault(fragment.output_name, fragment.source)
        if first != fragment.source:
            raise InputError(
                f"{first} and {fragment.source} would both be written to {fragment.output_name}. "
                "Rename one, or set "
                "data.input to leave it out."
            )


def _refuse_nesting(root: AnyPath, names: list[str], data: DataConfig) -> None:
    """Refuse an output that the next run would read as rows, or that holds the input."""
    output = real_path(data.output)
    with naming("data.output"):
        is_file = output.exists() and not output.is_dir()
    if is_file:
        raise InputError(f"{data.output}: is a file where a folder is expected. Set data.output.")
    # A glob of one folder's files does not reach into a folder below it.
    recursive = real_path(data.input).is_dir() or "**" in data.input
    if recursive and output.is_relative_to(real_path(root)):
        raise InputError(
            f"{data.output}: lies inside the input {root}, so answers would be read as rows. Set "
            "data.output."
        )
    for name in names:
        if output in real_path(root / name).parents:
            raise InputError(
                f"{data.output}: holds the input file {root / name}. Set data.output to a folder "
                "of its own."
            )


def _fragments_of(
    root: AnyPath, name: str, given: AnyPath, rows_per_fragment: int, needs: SchemaNeeds
) -> list[Fragment]:
    """The fragments of one file. No link may lead out of `given`, which the setting names."""
    path = root / name
    if not real_path(path).is_relative_to(given):
        raise UnusableFile(
            f"{path}: is a link that leads out of the input. Copy the file, or set data.input to "
            "it."
        )
    # Before the footer is read: what changes after it is found when the rows are read.
    with readable(path):
        stamp = stamp_file(path)
    with open_parquet(path) as file:
        schema = file.schema_arrow
        check_carried(str(path), file)
        form = written_form(file)
        group_rows = [
            file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)
        ]
        # Damaged footers say both; pyarrow checks neither against the other.
        if sum(group_rows) != file.metadata.num_rows:
            raise UnusableFile(
                f"{path}: its row groups hold {sum(group_rows)} rows, its footer says otherwise."
            )
    check_schema(path, name, schema, needs)
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
            form=form,
        )
        for first_row, rows, row_groups, skip_rows in cut(group_rows, rows_per_fragment)
    ]


def check_schema(path: AnyPath, name: str, schema: pa.Schema, needs: SchemaNeeds) -> None:
    """Check that the job's prompts and answers fit a file of this schema.

    InputError for a name that collides; UnusableFile for a column that is missing or holds no text,
    because other files may have it.
    """
    folders = [part.split("=", 1)[0] for part in PurePosixPath(name).parts[:-1] if "=" in part]
    # Readers take a folder day=1 for a column, and do not tell Mood from mood.
    taken = {column.casefold(): column for column in [*folders, *schema.names]}
    for column, step in needs.written.items():
        if column.casefold() in taken:
            raise InputError(
                f"{path}: already has a column {taken[column.casefold()]!r}, which step {step!r} "
                "would write. Rename the step."
            )
    try:
        for needed in needs.read:
            check_column(str(path), schema, needed.name, needed.setting, text=needed.is_text)
    except InputError as error:
        raise UnusableFile(str(error)) from error


def read_fragment(
    fragment: Fragment, columns: Sequence[str] | None = None, *, int96: TimeUnit = "us"
) -> Iterator[pa.RecordBatch]:
    """The rows of `fragment`, in order; of all columns when `columns` is None.

    UnusableFile when they cannot be read, or the file is no longer the one that was planned.
    """
    yield from read_rows(
        fragment.path, fragment.row_groups, fragment.skip_rows, fragment.rows, columns, int96=int96
    )
    # Asked last, so that a file that changes during the reading is found too.
    with readable(fragment.path):
        if stamp_file(fragment.path) != fragment.stamp:
            raise UnusableFile(
                f"{fragment.path}: was changed while the run read it. Run again when it is "
                "complete."
            )


def unit_of_times(fragment: Fragment) -> TimeUnit:
    """The unit that holds every INT96 time of the fragment; UnusableFile where none does."""
    if not fragment.form:  # then there is none
        return "us"
    return int96_unit(fragment.path, fragment.row_groups, fragment.skip_rows, fragment.rows)


def cut(
    group_rows: list[int], rows_per_fragment: int
) -> Iterator[tuple[int, int, tuple[int, ...], int]]:
    """Cut row groups of the given sizes into ranges.

    A range is (first row, rows, row groups, rows to skip in the first group).

    Whole row groups are put together up to `rows_per_fragment`, so that none is read twice; only a
    larger one is cut itself. A file without rows is one range of none, so that it has its place in
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
