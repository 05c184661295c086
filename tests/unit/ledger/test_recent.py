"""The cache of committed files stays small, whatever a run commits."""

from __future__ import annotations

import pyarrow as pa
import pytest

from glmbatch.ledger import recent
from glmbatch.ledger.recent import Content, Recent
from tests.unit.ledger.test_ledger import receipt


def test_old_tables_are_dropped_and_their_receipts_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "TABLE_BYTES", 3 * 800)
    table = pa.table({"number": range(100)})
    files = Recent()
    for number in range(3):
        files.keep(str(number), Content(receipt(), table))
    files.find("0")
    files.keep("3", Content(receipt(), table))
    contents = [files.find(str(number)) for number in range(4)]
    assert [content is not None and content.table is not None for content in contents] == [
        True,
        False,
        True,
        True,
    ]
    assert all(content is not None for content in contents)


def test_the_number_of_receipts_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "RECEIPTS", 2)
    files = Recent()
    for number in range(4):
        files.keep(str(number % 3), Content(receipt(), None))
    kept = [files.find(str(number)) is not None for number in range(3)]
    assert kept == [True, False, True]
