"""Column types in the output: which stay, which change, which are refused."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import UnusableFile
from glmbatch.store.types import check_carried, converted, times_in_utc, written_type

IDS = [UUID(int=5), None, UUID(int=7), UUID(int=9)]
TEXTS = [None if value is None else str(value) for value in IDS]


def uuids() -> pa.Array:
    return pa.array([None if value is None else value.bytes for value in IDS], pa.uuid())


def nested(kind: str) -> pa.Array:
    """UUIDs inside another type, in three rows; the second is null."""
    offsets, mask = pa.array([0, 2, 2, 4], pa.int32()), pa.array([False, True, False])
    if kind == "struct":
        return pa.StructArray.from_arrays([uuids().slice(0, 3)], ["u"], mask=mask)
    if kind == "map":
        kinds = pa.map_(pa.string(), pa.uuid())
        keys = pa.array(["a", "b", "c", "d"])
        return pa.MapArray.from_arrays(offsets, keys, uuids(), type=kinds, mask=mask)
    if kind == "fixed":
        pairs = pa.concat_arrays([uuids(), uuids().slice(0, 2)])
        return pa.FixedSizeListArray.from_arrays(pairs, 2, mask=mask)
    if kind == "view":
        firsts, sizes = pa.array([0, 2, 2], pa.int32()), pa.array([2, 0, 2], pa.int32())
        return pa.ListViewArray.from_arrays(firsts, sizes, uuids(), mask=mask)
    lists = pa.ListArray.from_arrays(offsets, uuids(), mask=mask)
    return lists if kind == "list" else lists.cast(pa.large_list(pa.uuid()))


@pytest.mark.parametrize("kind", ["struct", "map", "fixed", "list", "large", "view"])
def test_uuids_become_text_at_any_depth(kind: str) -> None:
    array = nested(kind)
    read = [str(value) for value in converted(array, written_type(array.type)).to_pylist()]
    expected = [str(value).replace("UUID('", "'").replace("')", "'") for value in array.to_pylist()]
    assert read == expected
    # A slice of a longer column keeps its own values.
    part = array.slice(1)
    assert [str(v) for v in converted(part, written_type(part.type)).to_pylist()] == read[1:]


@pytest.mark.parametrize(
    ("value", "kind"), [("interval 1 month", "INTERVAL"), ("5::variant", "VARIANT")]
)
def test_types_that_arrow_would_lose_are_refused_by_name(
    tmp_path: Path, value: str, kind: str
) -> None:
    path = tmp_path / "a.parquet"
    duckdb.sql(f"copy (select {value} as x, 'good' as text) to '{path}'")
    with pq.ParquetFile(path) as file, pytest.raises(UnusableFile, match=f"'x' is of .* {kind}"):
        check_carried("a.parquet", file)


def test_times_of_day_keep_their_zone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for value, in_utc in (("'01:02:03+02'::timetz", True), ("time '01:02:03'", False)):
        duckdb.sql(f"copy (select {value} as x) to '{path}'")
        with pq.ParquetFile(path) as file:
            check_carried("a.parquet", file)
            assert times_in_utc(file) == in_utc
    duckdb.sql(f"copy (select time '01:02:03' as x, '01:02:03+02'::timetz as y) to '{path}'")
    with pq.ParquetFile(path) as file, pytest.raises(UnusableFile, match="both in UTC and without"):
        check_carried("a.parquet", file)


def test_list_views_become_valid_lists() -> None:
    firsts, sizes = pa.array([1, 0, 0], pa.int32()), pa.array([2, 0, 1], pa.int32())
    views = pa.ListViewArray.from_arrays(firsts, sizes, pa.array([1, 2, 3]))
    lists = converted(views, pa.list_(pa.int64()))
    lists.validate(full=True)
    assert lists.to_pylist() == [[2, 3], [], [1]]
    assert converted(views.slice(1), pa.list_(pa.int64())).to_pylist() == [[], [1]]


def test_views_of_views_of_uuids_become_text() -> None:
    firsts, sizes = pa.array([2, 0, 1], pa.int32()), pa.array([1, 2, 2], pa.int32())
    inner = pa.ListViewArray.from_arrays(firsts, sizes, uuids())
    outer = pa.ListViewArray.from_arrays(
        pa.array([0, 0, 1], pa.int32()),
        pa.array([1, 0, 2], pa.int32()),
        inner,
        mask=pa.array([False, True, False]),
    )
    texts = [[TEXTS[2:3]], None, [TEXTS[:2], TEXTS[1:3]]]
    for array, expected in ((outer, texts), (outer.slice(1), texts[1:])):
        written = converted(array, written_type(array.type))
        written.validate(full=True)
        assert written.to_pylist() == expected
        assert converted(array, pa.list_(pa.list_(pa.string()))).to_pylist() == expected
