"""What a footer says: whether pyarrow can show it, and what of it the output keeps. Reads no rows.

Other tools describe the columns under footer keys of their own. Some (Spark, Avro, Iceberg,
`datasets`) trust that description more than the file's schema, so they would not see our columns.
An output therefore keeps only what stays true beside the new columns:

    pandas                 extended by our columns
    how values are stored  GeoParquet's columns, the calendar in which Spark wrote dates
    notes                  text that describes no columns, such as a team or a licence

The ids of columns are dropped as well (types.py).
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glmbatch.store.types import leaves, written_fields

PANDAS = b"pandas"
# These keys describe only named columns or values, which the output has unchanged.
STAYING = re.compile(rb"geo|PANDAS_ATTRS|org\.apache\.spark\.(version|timeZone|legacy\w*)")
DESCRIBING_KEY = re.compile(
    r"schema|struct|column|field|feature|dtype|descriptor|metadata|model|class|arrow|avro|proto"
    r"|thrift|iceberg|delta|hoodie|hudi|polars|dask|fastparquet|huggingface",
    re.IGNORECASE,
)
DESCRIBING_WORDS = frozenset({"fields", "columns", "features", "schema", "dtypes", "message"})
MAX_NOTE_BYTES = 64 << 10


def check_chunks(file: pq.ParquetFile, row_groups: Sequence[int] | None = None) -> None:
    """OSError if the footer contradicts itself about a column of these row groups, or of all.

    Call it before `RowGroupMetaData.column` and before statistics, which abort the process then:
    pyarrow 26 does not catch there what its C++ part throws. A reader does, before it asks for the
    first byte.
    """
    metadata = file.metadata
    groups = range(metadata.num_row_groups) if row_groups is None else row_groups
    rows = pq.ParquetFile(pa.PythonFile(_NoBytes(), mode="r"), metadata=metadata)
    with suppress(_AskedForBytes):
        next(rows.iter_batches(1, row_groups=list(groups), use_threads=False), None)
    kinds = [(leaf.path, leaf.physical_type) for leaf in leaves(file)]
    for number in groups:
        group = metadata.row_group(number)
        for at, (path, kind) in enumerate(kinds):
            if (other := group.column(at).physical_type) != kind:
                raise OSError(f"column {path!r} is {kind}, and {other} below")


class _AskedForBytes(Exception):
    """The reader has accepted the footer."""


class _NoBytes(io.RawIOBase):
    """A file of any size, of which nothing can be read."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return offset

    def tell(self) -> int:
        return sys.maxsize

    def read(self, size: int = -1) -> bytes:
        raise _AskedForBytes


def written_form(file: pq.ParquetFile) -> str:
    """ "1" if the output changes a column's type or drops metadata of the file; "" if it does not.

    It is part of the output key, so that outputs of versions that did not do so are written again.
    The pandas key does not count, because what it says stays true.
    """
    source = file.schema_arrow
    fields = written_fields(file)
    kept = kept_metadata(source, fields, range(file.metadata.num_rows))
    others = (source.metadata or {}).keys() - kept.keys() - {PANDAS}
    same = pa.schema(fields).equals(source.remove_metadata(), check_metadata=True)
    return "" if same and not others else "1"


def kept_metadata(
    source: pa.Schema, columns: Sequence[pa.Field], rows: range | None
) -> dict[bytes, bytes]:
    """The footer metadata of `source` that stays true in a file of its `rows` with `columns`.

    `rows` is None if they are no range.
    Keys and values are as Parquet stores them.
    """
    kept: dict[bytes, bytes] = {}
    for key, value in (source.metadata or {}).items():
        if key == PANDAS:
            extended = _pandas(value, source, columns, rows)
            if extended is not None:
                kept[key] = extended
        elif STAYING.fullmatch(key) or _is_note(key, value, source.names):
            kept[key] = value
    return kept


def _is_note(key: bytes, value: bytes, names: Sequence[str]) -> bool:
    """Whether this is text that, as far as we can tell, describes no columns."""
    try:
        name, text = key.decode(), value.decode()
    except UnicodeDecodeError:
        return False
    if DESCRIBING_KEY.search(name) or len(value) > MAX_NOTE_BYTES:
        return False
    try:
        parts = set(_texts_of(json.loads(text)))
    except (ValueError, RecursionError):
        return not _names_columns(text, names)
    if DESCRIBING_WORDS & parts or parts.intersection(names):
        return False
    return not any(_names_columns(part, names) for part in parts)


def _texts_of(value: Any) -> Iterator[str]:
    """Every name and text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name
            yield from _texts_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts_of(part)


def _names_columns(text: str, names: Sequence[str]) -> bool:
    """Whether a text that is not JSON describes columns, that is, contains all names as words.

    The name of a single column does not count: it may be a word of a sentence, such as `text`.
    """
    words = set(re.findall(r"\w+", text))
    if any(mark in text for mark in "{[<(;\0") and DESCRIBING_WORDS & words:
        return True
    named = set(re.findall(r"\w+", " ".join(names)))
    return len(names) > 1 and bool(named) and named <= words


def _pandas(
    value: bytes, source: pa.Schema, columns: Sequence[pa.Field], rows: range | None
) -> bytes | None:
    """The description that pandas writes, extended by our columns; None if it is not valid.

    It also says which columns are the index.
    """
    try:
        described = json.loads(value)
        entries = {entry["field_name"]: entry for entry in described["columns"]}
        index = [_index_part(part, rows) for part in described["index_columns"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    written = {field.name for field in columns}
    described["index_columns"] = [
        part for part in index if part is not None and (isinstance(part, dict) or part in written)
    ]
    # If the frame's names were numbers or tuples, pandas would convert our names too, and fail.
    labels = described.get("column_indexes") or []
    if [label.get("pandas_type") for label in labels] != ["unicode"]:
        described["column_indexes"] = []
    described["columns"] = list(_entries(entries, source, columns))
    return json.dumps(described).encode()


def _index_part(part: Any, rows: range | None) -> Any:
    """The name of an index column, or the part of a range index that these rows have."""
    if not isinstance(part, dict):
        return part
    counted = range(part["start"], part["stop"], part["step"])
    if rows is None or len(counted) < rows.stop:  # the range does not match the file
        return None
    own = counted[rows.start : rows.stop]
    return {**part, "start": own.start, "stop": own.stop, "step": own.step}


def _entries(
    entries: dict[str, Any], source: pa.Schema, columns: Iterable[pa.Field]
) -> Iterator[dict[str, Any]]:
    kinds = {field.name: field.type for field in source}
    for field in columns:
        if field.name in entries and kinds.get(field.name) == field.type:
            yield entries[field.name]
        elif field.name in entries or field.name not in kinds:
            yield _entry(field)


def _entry(field: pa.Field) -> dict[str, Any]:
    """The description of a column as pandas writes it: numbers by type, all else as objects."""
    kind = field.type
    if pa.types.is_string(kind):
        names = ("unicode", "object")
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        names = (str(kind.to_pandas_dtype().__name__),) * 2
    else:
        names = ("bytes" if pa.types.is_binary(kind) else "object", "object")
    return {
        "name": field.name,
        "field_name": field.name,
        "pandas_type": names[0],
        "numpy_type": names[1],
        "metadata": None,
    }
