"""The list of published files as a Parquet file, for a manifest that names many of them.

    OUTPUT/_glmbatch/files/<digest>.parquet    a row for each file, a column for each field

Its name is made of its digest, so a list never changes under its name. Knows no manifest, and of an
entry only that it is a dataclass: a list without a column for a field gives that field's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_json

from glmbatch.store.errors import one_line
from glmbatch.store.files import (
    DIGEST_CHARS,
    commit,
    digest_file,
    partial_beside,
    reachable,
    writable,
)
from glmbatch.store.folder import Name
from glmbatch.store.parquet import write_table
from glmbatch.store.paths import AnyPath

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Entry = TypeVar("Entry", bound=DataclassInstance)

LISTS = "_glmbatch/files"


class FileList(BaseModel, frozen=True, extra="forbid"):
    """What a manifest says of its list: name and digest, and how many files and rows it lists."""

    name: Name
    digest: str
    files: int
    rows: int


class ListMissing(ValueError):
    """The list is not there."""


def commit_list(output: AnyPath, entries: Sequence[DataclassInstance], rows: int) -> FileList:
    """Commit a list of `entries`, of which there is one at least, unless the same list is there.

    Raises as `commit`.
    """
    kind = type(entries[0])
    table = pa.table({field.name: _encoded(entries, kind, field) for field in fields(kind)})
    with partial_beside(output / LISTS / "list") as partial:
        with writable(output / LISTS):
            write_table(partial, table.schema, iter(table.to_batches()), {})
            digest = digest_file(partial)
        name = f"{LISTS}/{digest[:DIGEST_CHARS]}.parquet"
        if not _is_whole(output / name, digest):
            commit(partial, output / name)
    return FileList(name=name, digest=digest, files=len(entries), rows=rows)


def _is_whole(path: AnyPath, digest: str) -> bool:
    try:
        return digest_file(path) == digest
    except OSError:  # also when something else has its name
        return False


def read_list(output: AnyPath, file_list: FileList, kind: type[Entry]) -> tuple[Entry, ...]:
    """The entries of a list. ListMissing without the list; ValueError when it is damaged."""
    where = f"its list {file_list.name}"
    try:
        content = (output / file_list.name).read_bytes()
    except FileNotFoundError as error:
        raise ListMissing(f"{where} is missing") from error
    if sha256(content).hexdigest() != file_list.digest:
        raise ValueError(f"{where} has another digest")
    try:
        return _entries(pq.ParquetFile(pa.BufferReader(content)).read(), kind)
    except (pa.ArrowException, LookupError, TypeError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from error


def _entries(table: pa.Table, kind: type[Entry]) -> tuple[Entry, ...]:
    unknown = sorted(set(table.column_names) - {field.name for field in fields(kind)})
    if unknown:  # as for an unknown key of the JSON: only a later version knows what it means
        raise ValueError(f"the list of files has an unknown column {unknown[0]!r}")
    return tuple(map(kind, *(_decoded(table, kind, field) for field in fields(kind))))


def find_lists(output: AnyPath) -> list[AnyPath]:
    """The lists in the folder `output`, of whatever manifest."""
    with reachable(output / LISTS):
        return [*(output / LISTS).glob("*.parquet")]


# Whole numbers and text are stored as they are, everything else as JSON. Text that repeats has a
# dictionary: its values are made once when the list is read, and shared by the entries.


def _encoded(
    entries: Sequence[DataclassInstance], kind: type[DataclassInstance], field: Field[Any]
) -> pa.Array:
    """The column of `field` over `entries`."""
    values = [getattr(entry, field.name) for entry in entries]
    plain, _ = _type_of(kind, field.name)
    if plain is int:
        return pa.array(values, pa.int64())
    texts = pa.array(values if plain is str else map(to_json, values), pa.string())
    coded = texts.dictionary_encode()
    return coded if 2 * len(coded.dictionary) <= len(texts) else texts


def _decoded(table: pa.Table, kind: type[DataclassInstance], field: Field[Any]) -> list[Any]:
    """The checked values of `field`; its default for all if the list has no such column."""
    if field.name not in table.column_names:
        if field.default_factory is not MISSING:
            return [field.default_factory()] * len(table)
        if field.default is MISSING:
            raise ValueError(f"the list of files has no column {field.name!r}")
        return [field.default] * len(table)
    plain, checked = _type_of(kind, field.name)
    values: list[Any] = []
    for chunk in table.column(field.name).chunks:
        coded = isinstance(chunk, pa.DictionaryArray)
        stored = (chunk.dictionary if coded else chunk).to_numpy(zero_copy_only=False).tolist()
        if plain in (str, int):
            made = checked.validate_python(stored, strict=True)
        else:
            made = checked.validate_json(f"[{','.join(stored)}]")
        values += map(made.__getitem__, chunk.indices.to_pylist()) if coded else made
    return values


@lru_cache
def _type_of(kind: type[DataclassInstance], name: str) -> tuple[Any, TypeAdapter[list[Any]]]:
    """The type of a field without annotations, and what checks a list of its values."""
    hint = get_type_hints(kind, include_extras=True)[name]
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    checked: TypeAdapter[list[Any]] = TypeAdapter(list[hint])  # type: ignore[valid-type]
    return plain, checked
