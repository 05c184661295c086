"""A condition holds for the rows for which a person would say so, whatever the column's type."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from glmbatch.errors import InputError
from glmbatch.settings.conditions import parse_condition
from glmbatch.store.inputs.conditions import check_tests, rows_where

NAN = float("nan")


def where(text: str, **columns: Any) -> list[bool | None]:
    chunked = {}
    for name, values in columns.items():
        array = values if isinstance(values, pa.Array) else pa.array(values)
        # In two chunks, as a file of several row groups is read.
        chunked[name] = pa.chunked_array([array[:1], array[1:]])
    return rows_where(parse_condition(text), chunked)


def test_a_null_is_neither_less_nor_not_less() -> None:
    stars = [1, None, 5]
    assert where("stars < 3", stars=stars) == [True, False, False]
    assert where("not stars < 3", stars=stars) == [False, False, True]
    assert where("stars not in (5, 6)", stars=stars) == [True, False, False]
    assert where("stars is null or stars > 4", stars=stars) == [False, True, True]
    assert where("price < 3", price=[1.0, NAN, None]) == [True, False, False]
    assert where("price is null", price=[1.0, NAN, None]) == [False, True, True]
    assert where("x < 3 or x is null", x=pa.nulls(2)) == [True, True]


@pytest.mark.parametrize(
    ("test", "values"),
    [
        ("x == 'de'", pa.array(["de", "en"]).dictionary_encode()),
        ("x == 'de'", pa.array([b"de", b"\xff"])),
        ("x < 'en'", pa.array(["de", "en"], pa.string_view())),
        ("x == 0.1", pa.array([0.1, 0.2], pa.float32())),
        ("x <= 0.5", pa.array([0.5, 0.75], pa.float16())),
        ("x == 12.34", pa.array([Decimal("12.34"), Decimal("12.33")])),
        ("x < 12.345", pa.array([Decimal("12.34"), Decimal("12.35")])),
        ("x > 9007199254740992", pa.array([2**53 + 1, 2**53])),
        ("x > 5", pa.array([2**64 - 1, 5], pa.uint64())),
        ("x > 2.5", pa.array([3, 2], pa.int8())),
        ("x >= '2026-02-01'", pa.array([datetime.date(2026, 2, 1), datetime.date(2026, 1, 31)])),
        ("x < '2026-01-01T12:00:00Z'", pa.array([0, 2**60], pa.timestamp("us", "Europe/Berlin"))),
        ("x", pa.array([True, False])),
        ("x is not null", pa.array([[1], None])),
    ],
)
def test_columns_of_every_type_are_tested(test: str, values: pa.Array) -> None:
    assert where(test, x=values) == [True, False]


@pytest.mark.parametrize(
    ("test", "kind"),
    [
        ("x < '3'", pa.int64()),
        ("x < 3", pa.string()),
        ("x == 1", pa.bool_()),
        ("x < true", pa.bool_()),
        ("x", pa.int8()),
        ("x == 'soon'", pa.date32()),
        ("x in (1, 'a')", pa.list_(pa.int64())),
        ("x == 'a'", pa.struct([("a", pa.string())])),
        ("x > '1'", pa.duration("s")),
        ("x < 1e-300", pa.int64()),
    ],
)
def test_a_test_that_a_type_does_not_allow_is_refused(test: str, kind: pa.DataType) -> None:
    with pytest.raises(InputError, match=r"a.parquet: column 'x' holds .* Set steps\[0\].when"):
        check_tests(parse_condition(test), {"x": kind}, ("a.parquet", "steps[0].when"))


def test_folder_values_are_numbers_where_they_are_tested_so() -> None:
    place = ("a.parquet", "steps[0].when")
    for text in ("day > 2", "day in (3, 4.5)", "day == '03'", "not day < 3"):
        check_tests(parse_condition(text), {}, place, {"day": "03"})
        assert where(text, day=["03", "03", None]) == [True, True, False]
    assert where("day >= 3", day=["2.5", "3", "nan"]) == [False, True, False]
    with pytest.raises(InputError, match=r"a.parquet: column 'day' is 'x' here, .* Set steps\[0\]"):
        check_tests(parse_condition("day > 2"), {}, place, {"day": "x"})


def test_an_unknown_value_decides_only_where_it_matters() -> None:
    columns = {name: pa.chunked_array([[1, 1, 9, 9]]) for name in "ab"}
    columns["b"] = pa.chunked_array([pa.array([1, None, None, 1], pa.int64())])
    unknown = {"b": pa.chunked_array([[False, True, True, False]])}
    both = parse_condition("a < 3 and b < 3")
    assert rows_where(both, columns, unknown) == [True, None, False, False]
    assert rows_where(parse_condition("b is null"), columns, unknown) == [False, None, None, False]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string())])
def test_a_list_is_searched_with_nulls_as_in_sql(kind: pa.DataType) -> None:
    lists = pa.array([["price", "fit"], ["fit"], [], None, ["fit", None], [None, "price"]], kind)
    found = [True, False, False, False, False, True]
    assert where("'price' in x", x=lists) == found
    # Whether a null in the list is the price, nobody knows.
    assert where("'price' not in x", x=lists) == [False, True, True, False, False, False]
    assert where("2 in x", x=pa.array([[1, 2], [3]])) == [True, False]
    pairs = pa.array([["a", "b"], None, ["c", "b"]], pa.list_(pa.string(), 2))
    assert where("'c' in x", x=pairs) == [False, False, True]


@pytest.mark.parametrize(
    ("test", "kind", "reason"),
    [
        ("x == 'a'", pa.list_(pa.string()), "as == 'a'; write 'a' in x"),
        ("x in ('a', 'b')", pa.list_(pa.string()), "write 'a' in x"),
        ("'a' in x", pa.string(), "cannot be searched for 'a'; it is no list"),
        ("'a' in x", pa.list_(pa.int64()), "cannot be searched for 'a'"),
    ],
)
def test_a_list_and_its_values_are_told_apart(test: str, kind: pa.DataType, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_tests(parse_condition(test), {"x": kind}, ("a.parquet", "steps[0].when"))
