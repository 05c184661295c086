"""What a source's footer says that stays true beside columns of ours. Reads no rows.

Other tools keep a description of the columns under keys of their own, and some of them (Spark,
Avro, Iceberg, `datasets`) believe it before the file's own schema: our columns would not exist for
them. So nothing is copied but what is known to stay true:

    pandas                 extended by our columns
    how values are stored  GeoParquet's columns, the calendar in which Spark wrote days
    notes                  text that describes no columns, such as a team or a licence

Ids of columns go too (types.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glmbatch.store.types import written_fields

PANDAS = b"pandas"
# They speak of named columns or of values alone, and both are still there.
STAYING = re.compile(rb"geo|PANDAS_ATTRS|org\.apache\.spark\.(version|timeZone|legacy\w*)")
DESCRIBING_KEY = re.compile(
    r"schema|struct|column|field|feature|dtype|descriptor|metadata|model|class|arrow|avro|proto"
    r"|thrift|iceberg|delta|hoodie|hudi|polars|dask|fastparquet|huggingface",
    re.IGNORECASE,
)
DESCRIBING_WORDS = frozenset({"fields", "columns", "features", "schema", "dtypes", "message"})
MAX_NOTE_BYTES = 64 << 10


def written_form(file: pq.ParquetFile) -> str:
    """What tells a file whose columns or footer the output has otherwise; empty for any other.

    It is a part of the output's key: what was published before such columns were mended is written
    again. pandas' key is none of them, since what it said stays true.
    """
    source = file.schema_arrow
    fields = written_fields(file)
    kept = kept_metadata(source, fields, range(file.metadata.num_rows))
    others = (source.metadata or {}).keys() - kept.keys() - {PANDAS}
    same = pa.schema(fields).equals(source.remove_metadata(), check_metadata=True)
    return "" if same and not others else "1"


def kept_metadata(
    source: pa.Schema, columns: Sequence[pa.Field], rows: range
) -> dict[bytes, bytes]:
    """What stays true of the metadata of `source` in a file of its `rows` and these `columns`."""
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
    """Whether this is text that describes no columns, as far as can be told."""
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
    """Whether a text that is no JSON describes columns: all of them, by whole words.

    One name alone may be a word of a sentence, as `a` or `text` is.
    """
    words = set(re.findall(r"\w+", text))
    if any(mark in text for mark in "{[<(;\0") and DESCRIBING_WORDS & words:
        return True
    named = set(re.findall(r"\w+", " ".join(names)))
    return len(names) > 1 and bool(named) and named <= words


def _pandas(
    value: bytes, source: pa.Schema, columns: Sequence[pa.Field], rows: range
) -> bytes | None:
    """pandas' own description, which also names its index; None if it is none of pandas' making."""
    try:
        described = json.loads(value)
        entries = {entry["field_name"]: entry for entry in described["columns"]}
        index = [_index_part(part, rows) for part in described["index_columns"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    described["index_columns"] = [part for part in index if part is not None]
    # Of a frame with numbers or tuples for names pandas would make such of our names too, and fail.
    labels = described.get("column_indexes") or []
    if [label.get("pandas_type") for label in labels] != ["unicode"]:
        described["column_indexes"] = []
    described["columns"] = list(_entries(entries, source, columns))
    return json.dumps(described).encode()


def _index_part(part: Any, rows: range) -> Any:
    """A column that is the index, or the part of a counted one that these rows have."""
    if not isinstance(part, dict):
        return part
    counted = range(part["start"], part["stop"], part["step"])
    if len(counted) < rows.stop:  # it did not fit the file
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
    """A column as pandas describes one: numbers by their type, all else as objects."""
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
