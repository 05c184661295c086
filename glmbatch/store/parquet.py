"""Read and write columns of Parquet files. Stays in Arrow: no pandas, no tensors, no prompts.

Readers verify page checksums and do not pre-buffer: of a 2 GB file that keeps 0.3-0.5 GB in memory
instead of 2.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glmbatch.errors import MACHINE_ERRNOS, InputError, StoreRefused, TransientError, UnusableFile
from glmbatch.store.errors import (
    CHANGED_STATUS,
    one_line,
    status_of,
    store_errors,
)
from glmbatch.store.paths import Address, AnyPath, ObjectPath, location

READ_BATCH_ROWS = 10_000  # also the rows of a row group that is written
SMALL_BYTES = 32 << 20  # an object up to this size may be buffered whole: fewer requests


@contextmanager
def readable(address: Address) -> Iterator[None]:
    """Turn what reading a file raises into UnusableFile, or TransientError if the device failed.

    What a store refuses stays StoreRefused: credentials may expire during a run, and no file is to
    blame.
    """
    path = location(address)
    try:
        with store_errors(path):
            yield
    except StoreRefused as error:
        if status_of(error) != CHANGED_STATUS:
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
        # pyarrow raises OSError for damaged bytes too, but then without an errno of the system.
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{path}: cannot be read now: {error.strerror}.") from error
        raise UnusableFile(f"{path}: not readable as Parquet: {one_line(error)}.") from error


@contextmanager
def open_parquet(address: Address) -> Iterator[pq.ParquetFile]:
    """The opened file; reading it inside the `with` raises only our errors.

    Of an object only the parts that are read are fetched, and the parts of a small one side by
    side.
    """
    path = location(address)
    if isinstance(path, Path) and path.is_dir():
        raise UnusableFile(f"{path}: is a folder where a Parquet file is expected.")
    with readable(path), ExitStack() as opened:
        source = opened.enter_context(path.open_ranges()) if isinstance(path, ObjectPath) else path
        small = isinstance(path, ObjectPath) and getattr(source, "size", 0) <= SMALL_BYTES
        yield opened.enter_context(
            pq.ParquetFile(
                source, pre_buffer=small, buffer_size=1 << 20, page_checksum_verification=True
            )
        )


def read_rows(
    path: Address,
    row_groups: Sequence[int],
    skip_rows: int,
    rows: int,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Rows `skip_rows` to `skip_rows + rows` of the given row groups, in order, in batches.

    Only `columns` are read (all when None). UnusableFile when the bytes are damaged or rows are
    missing.
    """
    missing = rows
    if not rows:
        return
    with open_parquet(path) as file:
        names = list(columns) if columns is not None else None
        for batch in file.iter_batches(
            min(READ_BATCH_ROWS, rows), row_groups=list(row_groups), columns=names
        ):
            if skip_rows >= batch.num_rows:
                skip_rows -= batch.num_rows
                continue
            part = batch.slice(skip_rows, missing)
            skip_rows = 0
            missing -= part.num_rows
            yield part
            if not missing:  # the rest of the row group belongs to the next fragment
                return
    if missing:
        raise UnusableFile(f"{path}: {missing} rows fewer than its footer says.")


def read_columns(path: Address, names: Sequence[str]) -> pa.Table:
    """The named columns of a whole file, in that order; UnusableFile when one is not there."""
    with open_parquet(path) as file:
        missing = sorted(set(names) - set(file.schema_arrow.names))
        if missing:
            raise UnusableFile(f"{path}: has no column {missing[0]!r}")
        # Selected again, since Parquet gives columns in its own order.
        return file.read(columns=list(names)).select(list(names))


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type read as text; so does what pandas writes for no values at all."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_null(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def is_plain(kind: pa.DataType) -> bool:
    """Whether a prompt can hold a value of this type: text, number, truth value, date or time."""
    return is_text(kind) or bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or (
            pa.types.is_temporal(kind)
            and not pa.types.is_duration(kind)
            and not pa.types.is_interval(kind)
        )
    )


def prompt_values(column: pa.ChunkedArray) -> list[str | bytes | None]:
    """The values of a column as text; bytes where they are not UTF-8, None where null."""
    if pa.types.is_temporal(column.type):  # Python has no date after the year 9999, Arrow has
        column = column.cast(pa.string())
    if not is_text(column.type):
        return [None if value is None else str(value) for value in column.to_pylist()]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    # As bytes first: Arrow trusts a text column, and one byte that is no UTF-8 would end the run.
    return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def write_table(
    path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], metadata: dict[str, str]
) -> int:
    """Write `batches` to `path`, with `metadata` in the footer; returns the number of rows."""
    footer: dict[Any, Any] = dict(schema.metadata or {})
    for key, value in metadata.items():
        footer[key.encode()] = value.encode()
    rows = 0
    with pq.ParquetWriter(
        path, schema.with_metadata(footer), compression="zstd", write_page_checksum=True
    ) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def footer_metadata(path: AnyPath, key: str) -> str | None:
    """The text under `key` in the footer of `path`; None when the file or the key is not there.

    UnusableFile where it cannot be read; of an object, to be there is a part of that.
    """
    if isinstance(path, Path) and not path.is_file():
        return None
    with open_parquet(path) as file:
        value = (file.metadata.metadata or {}).get(key.encode())
        # Inside, since a damaged byte of the text is a damaged byte of the file.
        return None if value is None else value.decode()


def check_column(where: str, schema: pa.Schema, name: str, setting: str, *, text: bool) -> None:
    """InputError unless `schema` has one column `name` that a prompt can hold (text, if `text`)."""
    if schema.names.count(name) != 1:
        problem = (
            f"two columns {name!r}"
            if name in schema.names
            else f"no column {name!r}; it has {schema.names}"
        )
        raise InputError(f"{where}: {problem}. Set {setting}.")
    kind = schema.field(name).type
    if text and not is_text(kind):
        raise InputError(f"{where}: column {name!r} holds {kind}, not text. Set {setting}.")
    if not is_plain(kind):
        raise InputError(
            f"{where}: column {name!r} holds {kind}, which has no place in a prompt. Set {setting}."
        )
