"""Read and write columns of Parquet files with pyarrow. No pandas, no tensors, no prompts.

Readers verify page checksums and do not pre-buffer, so that a 2 GB file takes 0.3 to 0.5 GB of
memory instead of 2.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from glmbatch.errors import (
    MACHINE_ERRNOS,
    InputError,
    StoreRefused,
    TransientError,
    UnusableFile,
    shown,
    some_of,
)
from glmbatch.store.errors import store_errors, unread, was_changed
from glmbatch.store.files import refuse_change
from glmbatch.store.footers import check_chunks
from glmbatch.store.paths import Address, AnyPath, ObjectPath, location
from glmbatch.store.types import leaves
from glmbatch.store.values import is_plain, is_text

Rows = TypeVar("Rows", pa.RecordBatch, pa.Table)
ROW_GROUP_ROWS = 10_000  # most rows in a row group that is written
# Of a batch in memory and of a row group that is written: unused columns may hold pictures.
BATCH_BYTES = 32 << 20
# Most rows decoded at once: a million short rows take 0.4 s; with 10,000 they would take 0.3 s.
MOST_DECODED_ROWS = 1_000
# The limit where one repeated value may be long: a million short rows then take 1.1 s.
FEWEST_DECODED_ROWS = 250
SMALL_BYTES = 32 << 20  # an object up to this size is pre-buffered: fewer requests
TimeUnit = Literal["us", "ns"]


@contextmanager
def readable(address: Address, form: str = "Parquet") -> Iterator[None]:
    """Turn errors of reading a file into UnusableFile, or TransientError if the machine failed.

    A refusal by a store stays StoreRefused: credentials may expire during a run, which is not the
    fault of the file. An object that changed during the reading is UnusableFile.
    """
    path = location(address)
    try:
        with store_errors(path):
            yield
    except StoreRefused as error:
        if not was_changed(error):
            raise
        raise UnusableFile(
            f"{path}: was changed while the run read it. Run again when it is complete."
        ) from error
    except (
        pa.ArrowException,
        OSError,
        EOFError,
        UnicodeDecodeError,
        ValueError,
        OverflowError,
    ) as error:
        # pyarrow also raises OSError for damaged bytes, but without a system errno.
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{path}: cannot be read now: {error.strerror}.") from error
        raise UnusableFile(f"{path}: {unread(path, form, error)}.") from error


@contextmanager
def open_parquet(
    address: Address,
    int96: TimeUnit = "us",
    stamp: tuple[int, ...] | None = None,
    digest: str = "",
) -> Iterator[pq.ParquetFile]:
    """The open file; reading inside the `with` raises only our errors (see `readable`).

    With a `stamp` (see `version_stamp`), UnusableFile if what was opened has another one, and not
    the `digest` either (see `refuse_change`).

    From an object in a store, only the parts that are read are fetched; those of a small object are
    fetched in parallel. INT96 times are read in the unit `int96`. Nanoseconds only cover the years
    1677 to 2262: a time outside would be read as another time.
    """
    path = location(address)
    if isinstance(path, Path) and path.exists() and not path.is_file():  # a pipe would block
        kind = "folder" if path.is_dir() else "pipe or device"
        raise UnusableFile(f"{shown(path)}: is a {kind} where a Parquet file is expected.")
    with readable(path), ExitStack() as opened:
        if isinstance(path, ObjectPath):
            source = opened.enter_context(path.open_ranges())
            small = source.facts.size <= SMALL_BYTES
        else:
            source = opened.enter_context(pa.OSFile(str(path)))
            small = False
        if stamp is not None:
            refuse_change(path, stamp, source, digest)
        file = opened.enter_context(
            pq.ParquetFile(
                source,
                pre_buffer=small,
                buffer_size=1 << 20,
                page_checksum_verification=True,
                coerce_int96_timestamp_unit=int96,
            )
        )
        yield file


def read_rows(  # noqa: PLR0913 - which rows of which columns, and in which unit
    path: Address,
    row_groups: Sequence[int],
    skip_rows: int,
    rows: int,
    columns: Sequence[str] | None = None,
    *,
    int96: TimeUnit = "us",
) -> Iterator[pa.RecordBatch]:
    """Rows `skip_rows` to `skip_rows + rows` of the given row groups, in order, in batches.

    Reads only `columns`, or all if None. Batches are limited in rows and in bytes. INT96 times are
    read in the unit `int96`. UnusableFile when the bytes are damaged or rows are missing.
    """
    if not rows:
        return
    with open_parquet(path, int96) as file:
        yield from read_opened(file, row_groups, skip_rows, rows, columns=columns, where=path)


def read_opened(  # noqa: PLR0913 - the rows of read_rows, in a file that is open
    file: pq.ParquetFile,
    row_groups: Sequence[int],
    skip_rows: int,
    rows: int,
    *,
    columns: Sequence[str] | None = None,
    where: Address,
    checked: bool = False,
) -> Iterator[pa.RecordBatch]:
    """As `read_rows`, from the open `file`; messages name it `where`.

    Checks its footer, unless it was `checked` when the file was planned.
    """
    missing = rows
    if not rows:
        return
    if not checked:
        check_chunks(file, row_groups)
    names = list(columns) if columns is not None else None
    batch_rows = min(rows, _batch_rows(file, row_groups, names))
    for batch in file.iter_batches(batch_rows, row_groups=list(row_groups), columns=names):
        if skip_rows >= batch.num_rows:
            skip_rows -= batch.num_rows
            continue
        part = batch.slice(skip_rows, missing)
        skip_rows = 0
        missing -= part.num_rows
        yield part
        if not missing:  # the rest of the row group belongs to the next fragment
            return
    raise UnusableFile(f"{where}: has {missing} rows fewer than its footer says. Replace the file.")


def _batch_rows(
    file: pq.ParquetFile, row_groups: Sequence[int], names: Sequence[str] | None
) -> int:
    """The number of rows of these columns to decode at once: about BATCH_BYTES by the footer.

    At most MOST_DECODED_ROWS, because the footer only gives means, and all large values may be at
    the end.
    """
    wanted = None if names is None else set(names)
    paths = [leaf.path for leaf in leaves(file)]
    places = [at for at, path in enumerate(paths) if wanted is None or _belongs(path, wanted)]
    heaviest = dictionary_bytes = 1.0
    for number in row_groups:
        group = file.metadata.row_group(number)
        size_bytes = 0
        for at in places:
            column = group.column(at)
            # In memory a number has its full width, however well the file packs repetitions.
            size_bytes += max(column.total_uncompressed_size, 8 * column.num_values)
            is_bytes = column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
            if is_bytes and column.has_dictionary_page:
                dictionary_bytes = max(dictionary_bytes, column.total_uncompressed_size)
        heaviest = max(heaviest, size_bytes / max(group.num_rows, 1))
    # A dictionary stores each value once. A single long value may fill it, and in memory every row
    # has a copy.
    repeated = max(FEWEST_DECODED_ROWS, BATCH_BYTES / dictionary_bytes)
    return max(1, int(min(MOST_DECODED_ROWS, BATCH_BYTES / heaviest, repeated)))


def _belongs(path: str, names: set[str]) -> bool:
    """Whether the leaf column `path` belongs to one of the columns `names`, which may have dots."""
    ends = [place for place, letter in enumerate(path) if letter == "."]
    return path in names or any(path[:end] in names for end in ends)


def read_columns(
    path: Address, names: Sequence[str], constants: Mapping[str, str | None] | None = None
) -> pa.Table:
    """The columns `names` of a whole file, in that order.

    A column that the file lacks has its value in `constants` in all rows. UnusableFile when a
    column is in neither, or when the file cannot be read.
    """
    constants = constants or {}
    with open_parquet(path) as file:
        missing = sorted(set(names) - set(file.schema_arrow.names))
        unknown = [name for name in missing if name not in constants]
        if unknown:
            raise UnusableFile(f"{path}: has no column {unknown[0]!r}")
        # Selected again, because pyarrow returns columns in the file's order.
        table = file.read(columns=[name for name in names if name not in missing])
        return with_constants(table, {name: constants[name] for name in missing}).select(
            list(names)
        )


def read_valued_columns(path: Address, names: Sequence[str], optional: Sequence[str]) -> pa.Table:
    """The named columns of a whole file, without those of `optional` that have no value at all.

    UnusableFile when one of `names` is not there.
    """
    with open_parquet(path) as file:
        for name in names:
            if name not in file.schema_arrow.names:
                raise UnusableFile(f"{path}: has no column {name!r}")
        read = [name for name in names if name not in optional or not _is_null(file, name)]
        return file.read(columns=read)


def _is_null(file: pq.ParquetFile, name: str) -> bool:
    """Whether the statistics in the footer say that the column `name` has no value."""
    places = [at for at, leaf in enumerate(leaves(file)) if leaf.path == name]
    check_chunks(file)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for at in places:
            counts = group.column(at).statistics
            if counts is None or not counts.has_null_count or counts.null_count < group.num_rows:
                return False
    return bool(places)


def with_constants(rows: Rows, constants: Mapping[str, str | None]) -> Rows:
    """`rows` with a text column appended for each of `constants`, the same in all rows."""
    for name, value in constants.items():
        rows = rows.append_column(name, pa.repeat(pa.scalar(value, pa.string()), rows.num_rows))
    return rows


def write_table(
    path: Path,
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch],
    metadata: dict[str, str],
    *,
    utc_times: bool = False,
) -> int:
    """Write `batches` to the local file `path`, and return the number of rows.

    `metadata` is added to that of `schema` in the footer. Compressed with zstd, with page
    checksums. With `utc_times`, times of day are marked as UTC. OSError or pa.ArrowException when
    writing fails.
    """
    footer: dict[Any, Any] = dict(schema.metadata or {})
    for key, value in metadata.items():
        footer[key.encode()] = value.encode()
    rows = 0
    with pq.ParquetWriter(
        path,
        schema.with_metadata(footer),
        compression="zstd",
        write_page_checksum=True,
        write_time_adjusted_to_utc=utc_times,
    ) as writer:
        for group in _row_groups(batches):
            writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
            rows += group.num_rows
    return rows


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The batches, joined as long as they fit into a row group."""
    pending: list[pa.RecordBatch] = []
    rows = size_bytes = 0
    for batch in batches:
        full = rows + batch.num_rows > ROW_GROUP_ROWS or size_bytes + batch.nbytes > BATCH_BYTES
        if pending and full:
            yield pa.Table.from_batches(pending)
            pending, rows, size_bytes = [], 0, 0
        pending.append(batch)
        rows += batch.num_rows
        size_bytes += batch.nbytes
    if pending:
        yield pa.Table.from_batches(pending)


def footer_metadata(path: AnyPath, key: str) -> str | None:
    """The text under `key` in the footer of `path`; None if the local file or the key is missing.

    UnusableFile when it cannot be read, or when an object in a store is missing.
    """
    if isinstance(path, Path) and not path.is_file():
        return None
    with open_parquet(path) as file:
        value = (file.metadata.metadata or {}).get(key.encode())
        # Decoded inside the `with`, because a damaged byte of the text makes the file unusable.
        return None if value is None else value.decode()


def check_column(  # noqa: PLR0913 - what is asked of the column, and how a message names it
    where: str,
    schema: pa.Schema,
    name: str,
    setting: str,
    *,
    text: bool,
    plain: bool = True,
    folders: Sequence[str] = (),
    advice: str = "",
) -> None:
    """InputError unless `schema` has exactly one column `name`, with values that read as text.

    With `text`, the column itself must be text. Without `plain`, it may have any type. `setting`
    names the column. The message about a missing one lists `folders` too and ends with `advice`.
    """
    if schema.names.count(name) != 1:
        problem = (
            f"two columns {name!r}"
            if name in schema.names
            else f"no column {name!r}; it has {some_of([*schema.names, *folders], name)}{advice}"
        )
        if setting.endswith("prompt_template"):
            setting += ", with {{ and }} for literal braces"
        raise InputError(f"{where}: {problem}. Set {setting}.")
    kind = schema.field(name).type
    if text and not is_text(kind):
        raise InputError(f"{where}: column {name!r} holds {kind}, not text. Set {setting}.")
    if plain and not is_plain(kind):
        use = "cannot name a row" if setting == "data.id_column" else "has no place in a prompt"
        raise InputError(f"{where}: column {name!r} holds {kind}, which {use}. Set {setting}.")
