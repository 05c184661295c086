"""A database's table or query as one Parquet file. Credentials stay in the environment.

One statement reads all rows, so that they are those of one moment. They are sorted by their key,
so that the same rows give the same bytes, and a file that would be the same is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError, TransientError
from glmbatch.settings.addresses import has_credentials
from glmbatch.store.errors import one_line
from glmbatch.store.files import commit, digest_file, exists, partial_beside, writable
from glmbatch.store.folder import Folder
from glmbatch.store.parquet import write_table

SCHEMES = ("postgresql://", "postgres://")
INSTALL = "Run pip install 'glmbatch[postgresql]'."
# Classes of SQLSTATE after which the same query may succeed: connections, resources, shutdowns,
# and conflicts with other transactions.
PASSING = ("08", "53", "57", "40")
# Before the first day that PostgreSQL knows, in 4713 BC: in days and microseconds since 1970.
FIRST_DAY, FIRST_TIME = -2_500_000, -2_500_000 * 86_400 * 10**6
MOST_DIGITS = 38  # of a decimal that every reader of Parquet knows


@dataclass(frozen=True, slots=True)
class Taken:
    """What was written: the rows and columns, and whether the file had the same bytes before."""

    file: str
    rows: int
    columns: int
    same: bool


def take_snapshot(address: str, query: str, key: str, file: str) -> Taken:
    """Write the rows of `query` to the Parquet `file`, sorted by the column `key`.

    InputError when the query fails, when a key is null or twice, or when Parquet cannot hold a
    value; TransientError when the database cannot be reached. The file then stays as it was.
    """
    check_address(address)
    with _errors(), _connected(address) as cursor:
        statement = _statement(cursor, query, key)
        cursor.execute(statement)
        reader = cursor.fetch_record_batch()
        schema = pa.schema([_field(field) for field in reader.schema])
        with partial_beside(file, "FILE") as partial:
            with writable(file, "FILE"):
                rows = write_table(partial, schema, _batches(reader, schema, key), {})
            same = exists(file) and digest_file(file) == digest_file(partial)
            if not same:
                commit(partial, Folder(file).path, "FILE")
    return Taken(file, rows, len(schema), same)


def table_query(name: str) -> str:
    """The query for all columns of the table `name`, which may have its schema before a dot."""
    return f"SELECT * FROM {'.'.join(map(_quoted, name.split('.')))}"


def check_address(address: str) -> None:
    """InputError, which shows no secret, if `address` is not one of a database that can be read."""
    if has_credentials(address):
        raise InputError(
            "the address of a database must not contain credentials. Set PGUSER and PGPASSWORD in "
            "the environment, or write them to ~/.pgpass."
        )
    if not address.startswith(SCHEMES):
        # Not shown: it may be libpq's other form, host=... password=...
        raise InputError(
            "the address is not one of a database that can be read here. "
            "Write postgresql://host/database."
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        from adbc_driver_postgresql import dbapi
    except ImportError as error:
        raise InputError(f"{error.name} is not installed. {INSTALL}") from error
    with dbapi.connect(address) as connection, connection.cursor() as cursor:
        # A query may call functions that write.
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        connection.commit()
        yield cursor


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the driver's errors into ours. libpq's texts have no passwords."""
    try:
        yield
    except (ImportError, InputError, TransientError):
        raise
    except pa.ArrowException as error:
        raise InputError(
            f"a value cannot be written: {one_line(error)}. Cast it to text."
        ) from error
    except Exception as error:
        if not type(error).__module__.startswith("adbc_driver"):
            raise
        reason = _reason(error)
        state = getattr(error, "sqlstate", None)
        if state is None or state.startswith(PASSING):
            raise TransientError(f"the database cannot be read now: {reason}.") from error
        raise InputError(f"the database refuses: {reason}.") from error


def _reason(error: Exception) -> str:
    """The first line of what the server says, without the driver's own words before it."""
    return str(error).splitlines()[0].rpartition("ERROR:  ")[2]


def _statement(cursor: Any, query: str, key: str) -> str:
    """The statement that reads `query` in order, with values that Parquet has no type for as text.

    InputError without a column `key`.
    """
    inner = f"({query.strip().rstrip(';')}\n) AS rows"
    cursor.execute(f"SELECT * FROM {inner} LIMIT 0")
    fields = list(cursor.fetch_record_batch().schema)
    names = [field.name for field in fields]
    if names.count(key) != 1:
        raise InputError(f"the query has no column {key!r}; it has {names}. Set --key.")
    columns = []
    for field in fields:
        column = _quoted(field.name)
        if pa.types.is_nested(field.type):
            # The driver gives an array of several dimensions as if it had one.
            column = f"to_json({column})::text AS {column}"
        elif _is_foreign(field):
            column = f"{column}::text AS {column}"
        columns.append(column)
    return f"SELECT {', '.join(columns)} FROM {inner} ORDER BY rows.{_quoted(key)}"


def _is_foreign(field: pa.Field) -> bool:
    """Whether Parquet has no type for the values of a column that says what they are."""
    kind = _type_name(field)
    if kind in ("json", "jsonb"):
        return False
    if kind == "numeric":
        return _decimal(field) is None
    is_interval = pa.types.is_interval(field.type)
    return kind == "money" or is_interval or isinstance(field.type, pa.BaseExtensionType)


def _type_name(field: pa.Field) -> str:
    return ((field.metadata or {}).get(b"POSTGRESQL:type") or b"").decode()


def _decimal(field: pa.Field) -> pa.DataType | None:
    """The type of a numeric column that declares its digits; None without them, or for many."""
    modifier = int((field.metadata or {}).get(b"POSTGRESQL:typmod") or -1) - 4
    digits, places = modifier >> 16 & 0xFFFF, modifier & 0x7FF
    if modifier < 0 or digits > MOST_DIGITS or places > digits:
        return None
    return pa.decimal128(digits, places)


def _field(field: pa.Field) -> pa.Field:
    """The column as it is written, without what the driver says of it."""
    kind = field.type
    if _type_name(field) == "numeric" and (decimal := _decimal(field)) is not None:
        kind = decimal
    elif isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return pa.field(field.name, kind)


def _read(reader: Any) -> Iterator[pa.RecordBatch]:
    """The batches with rows. TransientError when the query breaks off."""
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except OSError as error:
            raise TransientError(f"the database ended the query: {_reason(error)}.") from error
        if batch.num_rows:
            yield batch


def _batches(reader: Any, schema: pa.Schema, key: str) -> Iterator[pa.RecordBatch]:
    last: pa.Scalar | None = None
    for batch in _read(reader):
        arrays = []
        for column, field in zip(batch.columns, schema, strict=True):
            plain = column.storage if isinstance(column, pa.ExtensionArray) else column
            plain = plain if plain.type == field.type else plain.cast(field.type)
            arrays.append(_finite(plain, field.name))
        last = _check_keys(arrays[schema.get_field_index(key)], last, key)
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _finite(column: pa.Array, name: str) -> pa.Array:
    """The column. InputError if it has the date or time infinity, which arrives as a far past."""
    kind = column.type
    if pa.types.is_date32(kind) or pa.types.is_timestamp(kind):
        numbers = column.cast(pa.int32() if pa.types.is_date32(kind) else pa.int64())
        least = pc.min(numbers).as_py()
        if least is not None and least < (FIRST_DAY if pa.types.is_date32(kind) else FIRST_TIME):
            raise InputError(
                f"column {name!r} has the value infinity, which Parquet has not. Cast it to text "
                "in the query."
            )
    return column


def _check_keys(keys: pa.Array, last: pa.Scalar | None, key: str) -> pa.Scalar:
    """The last key. InputError if one is null, or equal to the one before."""
    if keys.null_count:
        raise InputError(f"the key {key!r} is null in a row. Choose another --key.")
    before = pa.concat_arrays([pa.array([last.as_py()], keys.type), keys]) if last else keys
    same = pc.equal(before[:-1], before[1:])
    if pc.any(same).as_py():
        twice = before[:-1].filter(same)[0].as_py()
        raise InputError(f"the key {key!r} is {twice!r} in two rows. Choose another --key.")
    return keys[-1]
