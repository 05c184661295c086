"""Answers as later prompts show them."""

from __future__ import annotations

import json
from datetime import date

import pyarrow as pa

from glmbatch.run.prompts import as_text, column_texts


def test_a_field_is_spelled_as_in_the_json_of_all_fields() -> None:
    rows = [{"ok": True, "stars": 3}, {"ok": False, "stars": None}, None]
    table = pa.table({name: [row and row[name] for row in rows] for name in ("ok", "stars")})
    assert column_texts(table["ok"]) == ["true", "false", None]
    assert column_texts(table["stars"]) == ["3", None, None]
    assert json.loads(as_text(rows[0])) == rows[0]
    assert column_texts(pa.chunked_array([[[True, False], [], None]])) == ["true, false", "", None]
    assert as_text([date(2026, 11, 27), 2, "so"]) == "2026-11-27, 2, so"
