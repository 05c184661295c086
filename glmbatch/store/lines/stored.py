"""The rows of a file of lines as Parquet in the cache, made once for the same bytes and form.

    CACHE/lines/<digest of bytes and form>.parquet    appears by one rename

All columns are text, in the order in which the file names them. Three more come last:

    _line        the number of the line in which the row begins, from 1
    _line_error  why the line cannot be read; null if it can
    _line_text   such a line as it stands in the file

The cache may be deleted at any time: what is missing is made again.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from glmbatch.errors import InputError, TransientError, UnusableFile, shown
from glmbatch.store.files import PARTIAL, refuse_change
from glmbatch.store.lines.form import LINE_ERROR, Form
from glmbatch.store.lines.records import Record, csv_header, records_of
from glmbatch.store.lines.text import Lines, open_text
from glmbatch.store.modes import narrow
from glmbatch.store.parquet import BATCH_BYTES, ROW_GROUP_ROWS, readable, write_table
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

LINE, LINE_TEXT = "_line", "_line_text"
OWN_FIELDS = (
    pa.field(LINE, pa.int64()),
    pa.field(LINE_ERROR, pa.string()),
    pa.field(LINE_TEXT, pa.string()),
)
MOST_COLUMNS = 10_000
KEPT_SECONDS = 24 * 3600
FOLDER = "lines"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def stored_lines(cache: str | Path, digest: str, form: Form) -> Path:
    """Where the rows of the file with this `digest` are or will be."""
    key = sha256(f"{digest} {form.as_text()}".encode()).hexdigest()[:32]
    return Path(cache).expanduser() / FOLDER / f"{key}.parquet"


def store_lines(
    path: AnyPath, form: Form, stored: Path, stamp: tuple[int, ...], digest: str
) -> None:
    """Write the rows of the file of lines `path` to `stored`, unless they are there.

    UnusableFile if it cannot be read, or has not the `stamp` and `digest`.
    """
    if stored.is_file():
        with suppress(OSError):  # of another user
            os.utime(stored)
        return
    with _written(stored) as partial, readable(path, "lines"):
        try:
            columns = _columns(path, form, stamp)
            schema = pa.schema([*(pa.field(name, pa.string()) for name in columns), *OWN_FIELDS])
            with _opened(path, form, stamp) as lines:
                batches = _batches(records_of(lines, form), schema)
                write_table(partial, schema, batches, {})
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise TransientError(f"{stored}: cannot be written: the disk is full.") from error
        except UnusableFile as error:
            if str(error).startswith(shown(path)):
                raise
            raise UnusableFile(f"{shown(path)}: {error}.") from error
        refuse_change(path, stamp, digest=digest)
        narrow(partial, [path])


def sweep_lines(cache: str | Path) -> None:
    """Delete the rows that no run has used for a day, and what killed runs left."""
    aged = time.time() - KEPT_SECONDS
    with suppress(OSError):  # another run sweeps too
        for path in (Path(cache).expanduser() / FOLDER).iterdir():
            if path.stat().st_mtime < aged:
                path.unlink()


@contextmanager
def _opened(path: AnyPath, form: Form, stamp: tuple[int, ...]) -> Iterator[Lines]:
    with path.open("rb") as file:
        refuse_change(path, stamp, file)
        with open_text(cast(BinaryIO, file), form) as text:
            yield Lines(text)


def _columns(path: AnyPath, form: Form, stamp: tuple[int, ...]) -> list[str]:
    """The names of the file's columns: of a CSV's header, or all keys of JSON lines."""
    with _opened(path, form, stamp) as lines:
        if form.kind == "csv":
            columns = dict.fromkeys(csv_header(lines, form))
            empty = "is empty, without a header" if not columns else ""
        else:
            columns, empty = {}, "is empty"
            for record in records_of(lines, form):
                empty = ""
                columns.update(dict.fromkeys(record.fields))
                if len(columns) > MOST_COLUMNS:
                    raise UnusableFile(f"its lines have more than {MOST_COLUMNS:,} different keys")
    if empty and not form.columns:  # stored once more, with the columns of the job
        logger.warning("%s: %s: counts as 0 rows", shown(path), empty)
    for field in OWN_FIELDS:
        if field.name in columns:
            raise UnusableFile(f"has a column {field.name!r}, which glmbatch adds. Rename it")
    return list(columns) or list(form.columns)


def _batches(records: Iterator[Record], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    names = schema.names[: -len(OWN_FIELDS)]
    pending: list[Record] = []
    size = 0
    for record in records:
        pending.append(record)
        size += sum(map(len, filter(None, chain(record.fields.values(), [record.text]))))
        if len(pending) == ROW_GROUP_ROWS or size > BATCH_BYTES:
            yield _batch(pending, names, schema)
            pending, size = [], 0
    if pending:
        yield _batch(pending, names, schema)


def _batch(records: Sequence[Record], names: Sequence[str], schema: pa.Schema) -> pa.RecordBatch:
    columns: list[list[object]] = []
    for name in names:
        columns.append([record.fields.get(name) for record in records])
    columns.append([record.line for record in records])
    columns.append([record.error for record in records])
    columns.append([record.text for record in records])
    arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


@contextmanager
def _written(stored: Path) -> Iterator[Path]:
    """A path to write to, renamed to `stored` at the end if the block did not fail."""
    partial = stored.with_name(f".{stored.name}.{os.getpid()}.{os.urandom(4).hex()}{PARTIAL}")
    try:
        stored.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise InputError(
            f"{stored.parent}: cannot be written: {error.strerror}. Set runtime.cache."
        ) from error
    try:
        yield partial
        os.replace(partial, stored)
    finally:
        partial.unlink(missing_ok=True)
