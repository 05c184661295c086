"""A filter keeps the rows that DuckDB keeps, whatever folders and footers allow it to skip."""

from __future__ import annotations

import datetime as dt
import io
from decimal import Decimal
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmbatch.errors import InputError
from glmbatch.ledger.fragments import Fragment, packed
from glmbatch.ledger.input.ranges import cut_kept, ranges
from glmbatch.settings.conditions import Condition, parse_condition, text_of
from glmbatch.store.inputs.filters import kept_rows, row_filter

UTC = dt.UTC
DAY = dt.date(2026, 11, 25)
NOON = dt.datetime(2026, 11, 25, 12, 30)
# For each column: its type, its values, and values to compare it with as SQL spells them.
COLUMNS: dict[str, tuple[pa.DataType, list[Any], list[str]]] = {
    "whole": (pa.int64(), [-3, 0, 1, 2, 2**62], ["0", "1", "1.5", "-3", "4611686018427387904"]),
    "small": (pa.uint8(), [0, 1, 200, 255], ["0", "200", "256", "-1"]),
    "real": (pa.float64(), [-1.5, 0.0, -0.0, 0.1, 1e300, float("nan")], ["0", "0.1", "-1.5"]),
    "price": (pa.decimal128(9, 2), [Decimal("1.50"), Decimal("-2.00")], ["1.5", "-2", "1.501"]),
    "word": (pa.string(), ["", "a", "A", "ä", "中文", "🙂", "it's"], ["'a'", "'ä'", "'it''s'"]),
    "day": (pa.date32(), [DAY, dt.date(1, 1, 1), dt.date(9999, 12, 31)], ["'2026-11-25'"]),
    "time": (pa.timestamp("us"), [NOON, dt.datetime(1969, 1, 1)], ["'2026-11-25 12:30:00'"]),
    "zoned": (
        pa.timestamp("ms", "Asia/Shanghai"),
        [NOON.replace(tzinfo=UTC), dt.datetime(2026, 11, 25, 4, 30, tzinfo=UTC)],
        ["'2026-11-25T12:30:00+00:00'"],
    ),
    "flag": (pa.bool_(), [True, False], ["true", "false"]),
}
SIGNS = ["=", "<>", "<", "<=", ">", ">="]


@st.composite
def single_tests(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from([*COLUMNS]))
    values = COLUMNS[name][2]
    form = draw(st.sampled_from(["compare", "in", "null", "between", "alone"]))
    if form == "null":
        return f"{name} is {draw(st.sampled_from(['', 'not ']))}null"
    if name == "flag":
        sign = draw(st.sampled_from(["=", "<>"]))
        return name if form == "alone" else f"{name} {sign} {draw(st.sampled_from(values))}"
    if form == "in":
        some = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        return f"{name} {draw(st.sampled_from(['', 'not ']))}in ({', '.join(some)})"
    if form == "between":
        return f"{name} between {draw(st.sampled_from(values))} and {draw(st.sampled_from(values))}"
    return f"{name} {draw(st.sampled_from(SIGNS))} {draw(st.sampled_from(values))}"


CONDITIONS = st.recursive(
    single_tests(),
    lambda inner: st.one_of(
        inner.map(lambda one: f"not ({one})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda three: f"({three[0]}) {three[1]} ({three[2]})"
        ),
    ),
    max_leaves=6,
)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.integers(0, 12))
    columns = {}
    for name, (kind, values, _) in COLUMNS.items():
        one = st.one_of(st.none(), st.sampled_from(values))
        columns[name] = pa.array(draw(st.lists(one, min_size=rows, max_size=rows)), kind)
    return pa.table(columns)


def file_of(table: pa.Table, group: int) -> pq.ParquetFile:
    content = io.BytesIO()
    pq.write_table(table, content, row_group_size=group)
    return pq.ParquetFile(pa.BufferReader(content.getvalue()))


def kept(file: pq.ParquetFile, condition: str) -> list[int]:
    begin = 0
    numbers: list[int] = []
    for group, rows in enumerate(kept_rows(file, parse_condition(condition), "a file")):
        numbers += (rows + begin).tolist()
        begin += file.metadata.row_group(group).num_rows
    return numbers


@settings(max_examples=200, deadline=None)
@given(tables(), CONDITIONS, st.integers(1, 5))
def test_the_kept_rows_are_those_of_duckdb(table: pa.Table, condition: str, group: int) -> None:
    rows = table.append_column("place", pa.array(range(len(table)), pa.int64()))
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        database.register("rows", rows)
        # NaN counts as null here, as it does in a prompt.
        plain = "SELECT * REPLACE (if(isnan(real), NULL, real) AS real) FROM rows"
        found = database.execute(f"SELECT place FROM ({plain}) WHERE {condition} ORDER BY place")
        expected = [place for (place,) in found.fetchall()]
    assert kept(file_of(table, group), condition) == expected


def test_row_groups_are_decided_by_their_footers() -> None:
    table = pa.table({"n": range(100), "f": [1.0] * 50 + [float("nan")] * 50})

    class Refusing(pq.ParquetFile):
        """A file of which only some row groups may be read."""

        def iter_batches(self, *arguments: Any, **options: Any) -> Any:
            assert set(options["row_groups"]) <= allowed
            return super().iter_batches(*arguments, **options)

    content = io.BytesIO()
    pq.write_table(table, content, row_group_size=10)
    file = Refusing(pa.BufferReader(content.getvalue()))
    allowed = {4}
    assert kept(file, "n in (42, 43) or n = 47") == [42, 43, 47]
    assert kept(file, "not (n < 40 or n >= 50)") == list(range(40, 50))
    assert kept(file, "n > 39 and n between 0 and 49") == list(range(40, 50))
    allowed = set()
    assert kept(file, "n > 1000 or n is null") == []
    allowed = set(range(10))  # a footer says nothing of NaN, which is null
    assert kept(file, "f is null") == list(range(50, 100))


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("day = '2026-11-25'", True),
        ("day <> '2026-11-25' and n > 1", False),
        ("day = '2026-11-25' and n > 1", "n > 1"),
        ("day = '2026-11-25' or n > 1", True),
        ("not (day = '2026-11-25' and n > 1)", "not n > 1"),
        ("hour >= 9 and hour < 10.5", True),
        ("hour = '9'", False),
        ("hour = '09'", True),
        ("none_at_all = 'x' or n = 1", "n = 1"),
        ("not (none_at_all = 'x' and n = 1)", "not n = 1"),
        ("not (none_at_all = 'x' or n = 1)", False),
        ("not none_at_all = 'x'", False),
        ("none_at_all is null", True),
        ("text = 'a'", "body = 'a'"),
    ],
)
def test_folders_decide_what_they_can(where: str, left: bool | str) -> None:
    name = "day=2026-11-25/hour=09/none_at_all=__HIVE_DEFAULT_PARTITION__/a.parquet"
    expected: Condition | bool = parse_condition(left) if isinstance(left, str) else left
    found = row_filter(where, "body", {})
    assert found.left_of(name) == expected
    assert found.text_for(name) == (text_of(expected) if isinstance(left, str) else "")


@pytest.mark.parametrize("where", ["day > 3", "day", "day = true", "'x' in day"])
def test_what_a_folder_cannot_be_tested_for_is_refused(where: str) -> None:
    with pytest.raises(InputError, match=r"^day=x: column 'day' .* Set data\.where\.$"):
        row_filter(where, "text", {}).left_of("day=x/a.parquet")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=9), max_size=6), st.integers(1, 7))
def test_ranges_cover_a_file_and_have_each_kept_row(groups: list[list[bool]], most: int) -> None:
    rows = [len(group) for group in groups]
    chosen = [np.flatnonzero(np.array(group, bool)) for group in groups]
    mask = np.array([one for group in groups for one in group], bool)
    numbers: list[int] = []
    next_row = 0
    for first_row, span, used, part in cut_kept(chosen, rows, most):
        assert first_row == next_row
        assert len(part) <= most
        assert all(len(chosen[group]) for group in used)
        next_row += span
        numbers += part.tolist()
        assert not len(part) or first_row <= part[0] <= part[-1] < next_row
    assert next_row == sum(rows)
    assert numbers == np.flatnonzero(mask).tolist()


def test_a_fragment_knows_the_numbers_of_its_rows() -> None:
    part = next(iter(ranges([4, 4], 10, [np.array([1, 3]), np.array([], np.int64)])))
    place = {"source": "a", "path": "a", "digest": "", "stamp": ()}
    fragment = Fragment(**place, **part._asdict())
    assert fragment.numbers.tolist() == [1, 3]
    assert (fragment.rows, fragment.covered, fragment.row_groups) == (2, 8, (0,))
    assert fragment.model_copy(update={"rows": 1}).numbers.tolist() == [1]
    assert len(packed(np.array([5]), 10_000_000)) < 20_000
