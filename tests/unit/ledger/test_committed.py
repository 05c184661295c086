"""Committed files are found without listing the folder for each, and few stay in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from glmbatch.ledger import committed
from glmbatch.ledger.committed import Content, Recent
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import BundleReceipt
from glmbatch.store import files
from tests.unit.ledger.test_ledger import receipt

TABLE = pa.table({"mood": ["a", None]})


def numbered(number: int) -> BundleReceipt:
    return receipt(key=f"{number:032}")


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first argument of each call from now on."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def counted(argument: Any, *others: Any, **options: Any) -> Any:
        calls.append(argument)
        return original(argument, *others, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_run_lists_its_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    ledger.open("r")
    listed = calls_of(monkeypatch, os, "listdir")
    for number in range(30):
        assert ledger.find_answers(numbered(number).key, "r") is None
        ledger.keep_answers(numbered(number), TABLE)
        assert ledger.find_answers(numbered(number).key, "r") == numbered(number)
    assert len(listed) == 1
    ledger.close("r")


def test_files_of_other_processes_are_found(tmp_path: Path) -> None:
    mine, other = Ledger(tmp_path), Ledger(tmp_path)
    mine.open("r", shared=True)
    for number in range(30):
        assert mine.find_answers(numbered(number).key, "r") is None
        other.keep_answers(numbered(number), TABLE)
        assert mine.answers_receipt(numbered(number).key) == numbered(number)
    mine.close("r")


def test_an_old_file_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(Ledger(tmp_path).keep_answers(receipt(), TABLE).path)
    ledger = Ledger(tmp_path)
    digested = calls_of(monkeypatch, files, "digest_file")
    for _ in range(3):
        assert ledger.find_answers(receipt().key, "r")
    assert len(digested) == 3, "a change within one tick of the clock might not show"
    monkeypatch.setattr(files, "TICK_NS", -1)
    for _ in range(3):
        assert ledger.find_answers(receipt().key, "r")
    assert len(digested) == 4
    path.write_bytes(path.read_bytes()[:-1])
    assert ledger.find_answers(receipt().key, "r") is None
    assert not path.exists()


def test_deleted_answers_are_missing_and_can_be_committed_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open("r")
    for _ in range(2):
        Path(ledger.keep_answers(receipt(), TABLE).path).unlink()
        assert ledger.find_answers(receipt().key, "r") is None
    ledger.close("r")


def test_old_tables_are_dropped_and_their_receipts_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committed, "TABLE_BYTES", 3 * 800)
    table = pa.table({"number": range(100)})
    recent: Recent[BundleReceipt] = Recent()
    for number in range(3):
        recent.keep(str(number), Content(receipt(), table))
    recent.find("0")
    recent.keep("3", Content(receipt(), table))
    contents = [recent.find(str(number)) for number in range(4)]
    assert [content is not None and content.table is not None for content in contents] == [
        True,
        False,
        True,
        True,
    ]
    assert all(content is not None for content in contents)


def test_the_number_of_receipts_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committed, "RECEIPTS", 2)
    recent: Recent[BundleReceipt] = Recent()
    for number in range(4):
        recent.keep(str(number % 3), Content(receipt(), None))
    kept = [recent.find(str(number)) is not None for number in range(3)]
    assert kept == [True, False, True]
    used = receipt()
    recent.keep("used", Content(used, None))
    for number in range(4):
        recent.keep(str(number), Content(receipt(), None))
    assert recent.find("used") == Content(used, None)
