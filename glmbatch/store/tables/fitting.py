"""Show the rows of a table's file with the columns that the table has. Knows no format of tables.

A file keeps the columns that its table had when the file was written. A column that was added since
is null in all of its rows, one whose type was widened has its values in the wider type, and one
that was renamed or dropped since is so here too. What differs is carried as text: an Arrow schema
in base64, empty if nothing does.

The columns of some tables have ids, as field metadata like those of Parquet files. Then a file's
columns are found by their ids; those of a file without any get theirs by name, as the table says.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa
import pyarrow.ipc

from glmbatch.errors import UnusableFile
from glmbatch.store.types import converted, parts_of, with_parts, written_type
from glmbatch.store.values import holds_bytes, is_text, value_type

ID = b"PARQUET:field_id"
# In the metadata of a table's schema: the `Ids` of its columns, if files are matched by ids.
IDS = b"ids"
# In the metadata of what differs: the table's names of a file's columns, null for a dropped one.
NAMES = b"names"

# By the name of a column in files without ids: its id, and the same for the parts of its type.
Ids = Mapping[str, "tuple[int, Ids]"]


def table_columns(columns: Sequence[pa.Field], ids: Ids | None = None) -> pa.Schema:
    """The `columns` of a table, without their metadata.

    With `ids`, a file's columns are found by their ids, so these stay. Else they are found by their
    names. A comment on a column changes nothing in what is read.
    """
    by_ids = ids is not None
    metadata = {IDS: json.dumps(ids)} if by_ids else None
    return pa.schema([_bare(field, by_ids) for field in columns], metadata)


def _bare(field: pa.Field, by_ids: bool) -> pa.Field:
    kind = with_parts(field.type, [_bare(part, by_ids) for part in parts_of(field.type)])
    metadata = {ID: field.metadata[ID]} if by_ids else None
    return pa.field(field.name, kind, field.nullable, metadata)


def _id(field: pa.Field) -> bytes | None:
    number: bytes | None = (field.metadata or {}).get(ID)
    return number


def differing(
    where: str,
    file: pa.Schema,
    table: pa.Schema,
    given: Collection[str],
    unsaid: Mapping[str, str | None],
) -> str:
    """The columns of `table` that a file with the schema `file` has otherwise, or does not have.

    Those `given` by its folders' names need not be in it. `unsaid` is as in `Found`, for one file.
    UnusableFile, naming `where`, when a column cannot be read as the table's.
    """
    ids = _ids_in(table)
    own = _by_names(file) if ids is None else _by_ids(where, file, table, ids)
    fields = []
    for field in table:
        column = own.get(field.name)
        if column is not None:
            if ids is not None:
                _check_parts(where, field.name, column, field)
            if _alike(column.type, field.type):
                continue
            if not _widens(value_type(column.type), field.type):
                raise UnusableFile(
                    f"{where}: column {field.name!r} is {column.type}, and {field.type} in the "
                    "table. Rewrite the table's files."
                )
        elif unsaid.get(field.name) is not None:
            raise UnusableFile(
                f"{where}: has no column {field.name!r}, which is {unsaid[field.name]!r} in the "
                "table, and the names of its folders do not say so. Rewrite the table's files."
            )
        elif field.name in given:
            continue
        fields.append(pa.field(field.name, written_type(field.type)))
    names = {} if ids is None else _changed_names(file, own)
    if not fields and not names:
        return ""
    return schema_text(pa.schema(fields, {NAMES: json.dumps(names)} if names else None))


def _ids_in(table: pa.Schema) -> Ids | None:
    ids: Ids | None = json.loads((table.metadata or {}).get(IDS, b"null"))
    return ids


def _by_names(file: pa.Schema) -> dict[str, pa.Field]:
    return {field.name: field for field in reversed(list(file))}


def _by_ids(where: str, file: pa.Schema, table: pa.Schema, ids: Ids) -> dict[str, pa.Field]:
    """The columns of a `file` by their names in the `table`, which has the same ids."""
    columns = list(file)
    without = [field.name for field in columns if _id(field) is None]
    if without:
        if not ids:
            raise UnusableFile(
                f"{where}: column {without[0]!r} has no field id, and the table has no name "
                "mapping. Set one that says which of its columns this is."
            )
        columns = [_with_id(field, field.name, ids) for field in columns]
    by_id = {_id(field): field for field in columns if _id(field) is not None}
    return {field.name: by_id[_id(field)] for field in table if _id(field) in by_id}


def _with_id(field: pa.Field, name: str, ids: Ids) -> pa.Field:
    """The `field` of a file, called `name`, and its parts with their `ids`."""
    if name not in ids:
        return field
    number, own = ids[name]
    parts = parts_of(field.type)
    names = ["key", "value"] if pa.types.is_map(field.type) else ["element"]
    if pa.types.is_struct(field.type):
        names = [part.name for part in parts]
    inner = [_with_id(part, name, own) for part, name in zip(parts, names, strict=False)]
    return pa.field(field.name, with_parts(field.type, inner), field.nullable, {ID: str(number)})


def _check_parts(where: str, name: str, own: pa.Field, other: pa.Field) -> None:
    """UnusableFile when a part of the column `name` has another id than in the table, or none."""
    ours, theirs = parts_of(own.type), parts_of(other.type)
    if pa.types.is_struct(own.type):
        by_name = {part.name: part for part in theirs}
        ours = [part for part in ours if part.name in by_name]
        theirs = [by_name[part.name] for part in ours]
    for our_part, their_part in zip(ours, theirs, strict=False):
        what = f"{where}: column {name!r} has a field {our_part.name!r}"
        if _id(our_part) is None:
            raise UnusableFile(
                f"{what} that has no field id. Add it to the table's name mapping, or rewrite the "
                "table's files."
            )
        if _id(our_part) != _id(their_part):
            raise UnusableFile(
                f"{what} that is not the one of this name in the table: it was renamed or dropped. "
                "Rewrite the table's files."
            )
        _check_parts(where, name, our_part, their_part)


def _changed_names(file: pa.Schema, own: Mapping[str, pa.Field]) -> dict[str, str | None]:
    """The table's name of each column of a `file` that has another or, if it was dropped, none."""
    names = dict.fromkeys(file.names)
    names.update({field.name: name for name, field in own.items()})
    return {name: other for name, other in names.items() if other != name}


def schema_text(schema: pa.Schema) -> str:
    """The schema as text."""
    return b64encode(schema.serialize()).decode()


def schema_in(text: str) -> pa.Schema:
    """The schema in a text of `schema_text`; without columns if the text is empty."""
    return pa.ipc.read_schema(pa.py_buffer(b64decode(text))) if text else pa.schema([])


def _names_in(schema: pa.Schema) -> dict[str, str | None]:
    names: dict[str, str | None] = json.loads((schema.metadata or {}).get(NAMES, b"{}"))
    return names


def columns_in_file(columns: Sequence[str], text: str) -> list[str]:
    """What a file calls those of the table's `columns` that it has, or may have."""
    names = _names_in(schema_in(text))
    renamed = {name: own for own, name in names.items() if name is not None}
    return [renamed.get(name, name) for name in columns if name in renamed or name not in names]


def fitted_fields(fields: Sequence[pa.Field], text: str) -> list[pa.Field]:
    """The `fields` of a file with the table's names and types, and those it lacks at the end."""
    table = schema_in(text)
    names = _names_in(table)
    kinds = {field.name: field for field in table}
    own = []
    for field in fields:
        name = names.get(field.name, field.name)
        if name is not None:
            own.append(kinds.pop(name, field.with_name(name)))
    return [*own, *kinds.values()]


def fitted_rows(rows: pa.RecordBatch, text: str, columns: Sequence[str] | None) -> pa.RecordBatch:
    """The `rows` of a file as the table has them, with all columns or those of `columns`.

    UnusableFile when a value does not fit the type of the table.
    """
    table = schema_in(text)
    if names := _names_in(table):
        kept = [name for name in rows.schema.names if names.get(name, name) is not None]
        rows = rows.select(kept).rename_columns([names.get(name) or name for name in kept])
    for field in table:
        if field.name in rows.schema.names:
            at = rows.schema.names.index(field.name)
            rows = rows.set_column(at, field, _widened(rows.column(at), field))
        elif columns is None or field.name in columns:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows


def _widened(column: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return converted(column, value_type(column.type)).cast(field.type)
    except pa.ArrowException as error:
        raise UnusableFile(f"column {field.name!r} as {field.type}: {error}") from error


def _alike(own: pa.DataType, other: pa.DataType) -> bool:
    """Whether values of both types are read as the same: texts, and instants of any unit."""
    own, other = value_type(own), value_type(other)
    if pa.types.is_null(own) or pa.types.is_null(other):
        return bool(own == other)
    if is_text(own) and is_text(other):
        return holds_bytes(own) == holds_bytes(other)
    if pa.types.is_timestamp(own) and pa.types.is_timestamp(other):
        return True
    ours, theirs = parts_of(own), parts_of(other)
    if not ours or len(ours) != len(theirs) or _shape(own) != _shape(other):
        return bool(own == other)
    return all(_alike(one.type, two.type) for one, two in zip(ours, theirs, strict=True))


def _shape(kind: pa.DataType) -> object:
    """What two nested types share besides the types inside: lists of any kind, the same names."""
    if pa.types.is_struct(kind):
        return [part.name for part in parts_of(kind)]
    return "map" if pa.types.is_map(kind) else "list"


def _widens(own: pa.DataType, other: pa.DataType) -> bool:
    """Whether each value of the type `own` is one of the type `other`."""
    if pa.types.is_null(own) or _alike(own, other):
        return True
    ours, theirs = parts_of(own), parts_of(other)
    if not ours or not theirs:
        return _number_widens(own, other)
    if not (pa.types.is_struct(own) and pa.types.is_struct(other)):
        pairs = zip(ours, theirs, strict=False)
        return _shape(own) == _shape(other) and all(_widens(a.type, b.type) for a, b in pairs)
    kinds = {part.name: part.type for part in theirs}
    # A field of a struct that was added later is null too.
    return all(part.name in kinds and _widens(part.type, kinds[part.name]) for part in ours)


def _number_widens(own: pa.DataType, other: pa.DataType) -> bool:
    """As `_widens`, for numbers and dates."""
    widens = False
    is_integer = pa.types.is_integer(own)
    if pa.types.is_decimal(other) and (is_integer or pa.types.is_decimal(own)):
        scale = 0 if is_integer else own.scale
        whole = len(str(2 ** (own.bit_width - 1))) if is_integer else own.precision - scale
        widens = scale <= other.scale and whole <= other.precision - other.scale
    elif is_integer and pa.types.is_integer(other):
        widens = own.bit_width < other.bit_width
    elif pa.types.is_float64(other):
        widens = pa.types.is_float32(own) or (is_integer and own.bit_width <= 32)
    elif pa.types.is_timestamp(other):
        widens = pa.types.is_date(own) and other.tz is None
    return bool(widens)
