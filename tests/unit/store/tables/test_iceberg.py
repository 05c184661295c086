"""What the metadata of an Iceberg table say of the values in its files."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.types import LongType

from glmbatch.settings.conditions import columns_of, parse_condition
from glmbatch.store.inputs.filters import kept_rows, left_out, row_filter
from glmbatch.store.parquet import open_parquet
from glmbatch.store.tables.fitting import differing
from glmbatch.store.tables.iceberg import find_iceberg

INSTANTS = [datetime.datetime(2026, 11, day, 23, 59, 59, 999_999) for day in (1, 2, 3)]
COLUMNS = {
    "small": pa.array([1, 2, 3], pa.int32()),
    "share": pa.array([0.5, float("nan"), 2.5], pa.float32()),
    "price": pa.array([Decimal("1.10"), Decimal("2.20"), Decimal("3.30")], pa.decimal128(9, 2)),
    "day": pa.array([instant.date() for instant in INSTANTS], pa.date32()),
    "seen": pa.array(INSTANTS, pa.timestamp("us")),
    "sent": pa.array(INSTANTS, pa.timestamp("us", "UTC")),
    "name": pa.array(["a" * 20, "b" * 20, None]),
    "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
}


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("small >= 3", {2}),
        ("small = 2 and price > 2.2", set()),
        ("price > 2.2", {2}),
        ("date = '2026-11-02'", {1}),
        ("seen > '2026-11-02 23:59:59.999998'", {1, 2}),
        ("seen > '2026-11-02 23:59:59.999999'", {2}),
        ("sent <= '2026-11-01T23:59:59.999999Z'", {0}),
        ("share > 2", {1, 2}),
        ("share is null", {0, 1, 2}),  # NaN counts as null
        ("name = 'bbbbbbbbbbbbbbbbbbbb'", {1, 2}),
        ("name is null", {2}),
        ("text > 'zzz' or small = 1", {0}),
        ("'x' in tags", {0, 1, 2}),
    ],
)
def test_bounds_in_the_metadata_leave_files_out(
    catalog: Catalog, where: str, kept: set[int]
) -> None:
    columns = pa.table({"body": ["a", "b", "c"], **COLUMNS})
    table = catalog.create_table("shop.reviews", columns.schema)
    for number in range(3):
        table.append(columns.slice(number, 1))
    with table.update_schema() as schema:
        schema.update_column("small", LongType())
        schema.rename_column("day", "date")
    tested = {"body", *columns_of(parse_condition(where))}
    found = find_iceberg("iceberg:lake/shop.reviews", None, tested=tested)
    gone = left_out(found, row_filter(where, "body", {}))
    opened = {row(found.root / name) for name in found.names if name not in gone}
    assert opened == kept


def test_the_bounds_in_a_file_are_taken_in_the_tables_type(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"share": pa.array([0.1], pa.float32())}), path)
    with open_parquet(path) as file:
        own, table = file.schema_arrow, pa.schema([("share", pa.float64())])
        fitted = differing("a.parquet", own, table, (), {})
        condition = parse_condition("share > 0.1")  # as a float32 is, once it is a float64
        kept = [rows.tolist() for rows in kept_rows(file, condition, str(path), fitted)]
    assert kept == [[0]]


def row(path: Path) -> int:
    """The row of COLUMNS that is in a file."""
    return "abc".index(pq.read_table(path, columns=["body"])["body"][0].as_py())
