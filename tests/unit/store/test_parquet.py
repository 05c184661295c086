"""Columns are read as text, damage is detected, and memory is limited."""

from __future__ import annotations

import decimal
import os
from contextlib import suppress
from datetime import date
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmbatch.errors import InputError, UnusableFile
from glmbatch.settings.conditions import parse_condition
from glmbatch.store.footers import check_chunks
from glmbatch.store.inputs.filters import check_filter, kept_rows
from glmbatch.store.parquet import open_parquet, read_rows, read_valued_columns
from glmbatch.store.values import prompt_values

FUZZ = int(os.environ.get("FUZZ", "300"))  # damaged files to read
# The environment variable with which Arrow's own tests find a checkout of apache/parquet-testing.
CONFORMANCE = Path(os.environ.get("PARQUET_TEST_DATA", "not set"))

TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()),
]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_kind_of_text_column_reads_as_text(kind: pa.DataType) -> None:
    values = ["好", None, "", "emoji 🎉"]
    array = (
        pa.array(values, pa.string())
        .cast(pa.binary() if pa.types.is_binary(kind) else pa.string())
        .cast(kind)
    )
    assert prompt_values(pa.chunked_array([array, array])) == values * 2


def test_invalid_utf8_affects_only_its_own_row() -> None:
    column = pa.chunked_array([pa.array([b"fine", b"\xff\xfe", b"\xed\xa0\x80"])])
    assert prompt_values(column) == ["fine", b"\xff\xfe", b"\xed\xa0\x80"]


def test_numbers_and_dates_read_as_a_person_writes_them() -> None:
    values = [5, 2.5, True, date(2026, 11, 1), decimal.Decimal("1.50")]
    read = [prompt_values(pa.chunked_array([pa.array([value, None])])) for value in values]
    assert read == [
        ["5", None],
        ["2.5", None],
        ["True", None],
        ["2026-11-01", None],
        ["1.50", None],
    ]
    far = pa.array([2**62], pa.timestamp("us"))  # the year 148108, too late for Python's dates
    assert prompt_values(pa.chunked_array([far]))[0]


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    path = tmp_path / "numbered.parquet"
    pq.write_table(
        pa.table({"n": range(100), "other": range(100)}),
        path,
        row_group_size=30,
        write_page_checksum=True,
    )
    return path


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 99), rows=st.integers(1, 100))
def test_any_range_is_read_from_its_own_row_groups(numbered: Path, start: int, rows: int) -> None:
    rows = min(rows, 100 - start)
    groups = list(range(start // 30, (start + rows - 1) // 30 + 1))
    batches = list(read_rows(numbered, groups, start - groups[0] * 30, rows, ["n"]))
    assert [value for batch in batches for value in batch.column("n").to_pylist()] == list(
        range(start, start + rows)
    )
    assert all(batch.schema.names == ["n"] for batch in batches)


@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize("column", ["text", "with.dot"])
@pytest.mark.parametrize("light_rows", [64, 1_900])
def test_large_values_at_the_end_make_no_huge_batch(
    light_rows: int, column: str, use_dictionary: bool, tmp_path: Path
) -> None:
    values = ["a"] * light_rows + ["x" * 100_000] * (2_000 - light_rows)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({column: values}), path, use_dictionary=use_dictionary)
    batches = list(read_rows(path, [0], 0, 2_000, [column]))
    assert max(batch.nbytes for batch in batches) <= 33 << 20
    assert [value for batch in batches for value in batch.column(0).to_pylist()] == values


def test_fewer_rows_than_in_the_footer_is_an_error(numbered: Path) -> None:
    with pytest.raises(UnusableFile, match="5 rows fewer"):
        list(read_rows(numbered, [3], 0, 15))


def test_a_damaged_byte_is_never_read_as_data(numbered: Path) -> None:
    whole = numbered.read_bytes()
    with pq.ParquetFile(numbered) as file:
        column = file.metadata.row_group(1).column(0)
    at = (
        column.dictionary_page_offset or column.data_page_offset
    ) + column.total_compressed_size // 2
    numbered.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UnusableFile, match=r"numbered\.parquet: not readable as Parquet"):
        list(read_rows(numbered, [0, 1, 2, 3], 0, 100))
    assert sum(batch.num_rows for batch in read_rows(numbered, [0], 0, 30)) == 30


@pytest.mark.parametrize("damage", ["empty", "no magic", "cut", "folder"])
def test_a_file_that_is_not_parquet_is_named(numbered: Path, damage: str) -> None:
    path = numbered.with_name(f"{damage}.parquet")
    if damage == "folder":
        path.mkdir()
    else:
        whole = numbered.read_bytes()
        path.write_bytes(
            {"empty": b"", "no magic": b"plain text " * 9, "cut": whole[: len(whole) // 2]}[damage]
        )
    with pytest.raises(UnusableFile, match=path.name), open_parquet(path):
        pass


@pytest.mark.parametrize("codec", ["uncompressed", "snappy", "gzip", "zstd", "lz4_raw", "brotli"])
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_files_of_other_writers_read_as_they_read_them(
    tmp_path: Path, codec: str, version: str
) -> None:
    path = tmp_path / "foreign.parquet"
    rows = duckdb.sql(
        "select i as n, 'text ' || (i % 7) as text, i / 3.0 as part, [i, null] as list, "
        "{'a': i, 'b': 'x'} as struct, case when i % 5 = 0 then null else i % 3 end as few, "
        "date '2026-01-01' + i::int as day from range(5000) t(i)"
    )
    options = f"format parquet, codec {codec}, row_group_size 2048, parquet_version {version}"
    duckdb.sql(f"copy (from rows) to '{path}' ({options})")
    with open_parquet(path) as file:
        groups = list(range(file.metadata.num_row_groups))
    table = pa.Table.from_batches(list(read_rows(path, groups, 0, 5000)))
    assert [tuple(row.values()) for row in table.to_pylist()] == rows.fetchall()


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(
    "encoding",
    [
        "PLAIN",
        "DELTA_BINARY_PACKED",
        "DELTA_BYTE_ARRAY",
        "DELTA_LENGTH_BYTE_ARRAY",
        "BYTE_STREAM_SPLIT",
    ],
)
def test_every_encoding_gives_the_same_values(tmp_path: Path, encoding: str, version: str) -> None:
    words = pa.array([None if row % 11 == 0 else f"word {row % 97}" for row in range(3000)])
    numbers = pa.array([row * 37 % 1009 for row in range(3000)])
    column = words if encoding in ("DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY") else numbers
    path = tmp_path / "encoded.parquet"
    pq.write_table(
        pa.table({"x": column}),
        path,
        use_dictionary=False,
        column_encoding=encoding,
        data_page_version=version,
    )
    assert prompt_values(
        pa.chunked_array([b.column(0) for b in read_rows(path, [0], 0, 3000)])
    ) == prompt_values(pa.chunked_array([column]))


@pytest.mark.slow
@settings(
    max_examples=FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_any_damaged_byte_gives_rows_or_our_error(numbered: Path, at: int, flip: int) -> None:
    whole = numbered.read_bytes()
    at %= len(whole)
    damaged = numbered.with_name("damaged.parquet")
    damaged.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    try:
        with open_parquet(damaged) as file:
            groups = range(file.metadata.num_row_groups)
            rows = sum(file.metadata.row_group(index).num_rows for index in groups)
        list(read_rows(damaged, list(groups), 0, max(rows, 1)))
    except InputError:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("flip", [2, 3, 64])
def test_a_damaged_footer_never_ends_the_process(numbered: Path, flip: int) -> None:
    whole = numbered.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    condition = parse_condition("n > 10 and other < 5")
    refused = 0
    for at in range(footer, len(whole)):
        damaged = numbered.with_name("damaged.parquet")
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        try:
            with open_parquet(damaged) as file:  # as when it is planned
                check_chunks(file)
                check_filter(str(damaged), damaged.name, condition, file.schema_arrow, {})
                list(kept_rows(file, condition, str(damaged)))
        except InputError:
            refused += 1
        # As rows that are read without a plan: to train, to verify, in the viewer.
        with suppress(InputError):
            list(read_rows(damaged, [0], 0, 1))
        with suppress(InputError):
            read_valued_columns(damaged, ["n"], ["other"])
    assert refused > 100


@pytest.mark.slow
@pytest.mark.skipif(
    not CONFORMANCE.is_dir(), reason="PARQUET_TEST_DATA names no checkout of apache/parquet-testing"
)
def test_public_test_files_give_rows_or_our_error() -> None:
    outcomes = {}
    for path in sorted(CONFORMANCE.rglob("*.parquet")):
        try:
            with open_parquet(path) as file:
                groups = list(range(file.metadata.num_row_groups))
                rows = file.metadata.num_rows
            outcomes[path] = (
                sum(batch.num_rows for batch in read_rows(path, groups, 0, rows)) if rows else 0
            )
        except InputError:
            outcomes[path] = -1
    bad = [rows for path, rows in outcomes.items() if path.parent.name == "bad_data"]
    assert sum(rows < 0 for rows in bad) >= len(bad) - 1
    assert sum(rows >= 0 for rows in outcomes.values()) > 60
