"""Records of lines: which lines fail, and that reading goes on behind them."""

from __future__ import annotations

import io
from typing import Any

import pytest

from glmbatch.store.lines import text
from glmbatch.store.lines.form import Form
from glmbatch.store.lines.records import Record, records_of
from glmbatch.store.lines.text import Lines, open_text


def read(content: bytes, **form: Any) -> list[Record]:
    with open_text(io.BytesIO(content), Form(**form)) as opened:
        return list(records_of(Lines(opened), Form(**form)))


def test_an_open_quote_costs_one_line() -> None:
    records = read(b'id,text\n1,"open\n2,b\n3,"two\nlines"\n4,"late"x\n5,"end', kind="csv")
    found = [(each.line, each.fields.get("text"), each.text) for each in records]
    assert found == [
        (2, None, '1,"open'),
        (3, "b", None),
        (4, "two\nlines", None),
        (6, None, '4,"late"x'),
        (7, None, '5,"end'),
    ]


def test_a_record_has_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MOST_CHARS", 1_000)
    rows = [b"%d,%s" % (number, b"x" * 50) for number in range(100)]
    records = read(b"\n".join([b"id,text", b'0,"open', *rows]), kind="csv")
    assert [each.line for each in records if each.error] == [2]
    assert len(records) == 101


def test_columns_without_a_name_of_their_own_have_their_place() -> None:
    (record,) = read(b",a,a,b,a_2,\n1,2,3,4,5,6\n", kind="csv")
    assert list(record.fields) == ["column_1", "a_2_", "a_3", "b", "a_2", "column_6"]
    assert list(record.fields.values()) == list("123456")


def test_a_value_is_what_stands_in_the_line() -> None:
    line = b'{"a": 1.50, "b": {"x": [1, 2]}, "c": "\\u4e2d", "d": null, "e": 9e999, "f": ""}'
    (record,) = read(line, kind="json")
    assert list(record.fields.values()) == ["1.50", '{"x": [1, 2]}', "中", None, "9e999", ""]


@pytest.mark.parametrize(
    "content", [b"\xff\xfea\x00\n\x00\x00\xd8\n\x00b\x00", b"\xef\xbb\xbfa\n\xff\nb"]
)
def test_bytes_that_are_no_characters_cost_their_line(content: bytes) -> None:
    records = read(content, kind="csv")
    assert [each.fields.get("a") for each in records] == [None, "b"]
    assert records[0].error is not None
    assert "bytes that are no characters" in records[0].error
