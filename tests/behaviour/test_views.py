"""Columns of views, which some tools write: Arrow itself cannot take some of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

import glmbatch
from glmbatch.ledger.verification import verify
from glmbatch.run.canary import freeze
from glmbatch.view.corrections import Corrections, corrections_folder
from glmbatch.view.published import read_published
from tests.support import CLASSIFY, Settings, Write, rows_of, run

VIEW, TEXT = pa.string_view(), pa.string()
WORDS = [f"word {number}" for number in range(8)]


@pytest.mark.parametrize(
    ("kind", "expected", "values"),
    [
        (VIEW, TEXT, WORDS),
        (pa.binary_view(), pa.binary(), [word.encode() for word in WORDS]),
        (pa.list_(VIEW), pa.list_(TEXT), [[word, None] for word in WORDS]),
        (pa.struct({"a": VIEW}), pa.struct({"a": TEXT}), [{"a": word} for word in WORDS]),
        (pa.map_(VIEW, VIEW), pa.map_(TEXT, TEXT), [[(word, "x")] for word in WORDS]),
        (pa.list_view(TEXT), pa.list_view(TEXT), [[word] for word in WORDS]),
        (pa.list_view(VIEW), pa.list_view(TEXT), [[word] for word in WORDS]),
    ],
)
def test_some_rows_are_taken_from_views(
    write_source: Write,
    job_settings: Settings,
    out: Path,
    rows: list[str],
    tmp_path: Path,
    kind: pa.DataType,
    expected: pa.DataType,
    values: list[Any],
) -> None:
    columns = {
        "id": range(8),
        "text": pa.array(rows[:8], VIEW),
        "other": pa.array(values, kind),
        "mood": ["good", None, "bad", None, "bad", "good", None, "bad"],
    }
    source = write_source("a.parquet", pa.table({**columns, "id": pa.array(range(8))}))
    picked = [0, 2, 3, 6]
    settings = job_settings(
        steps=[{**CLASSIFY, "name": "tone"}],
        data__where="id in (0, 2, 3, 6)",
        data__id_column="id",
    )
    run(settings)
    found = {row["id"]: (row["text"], row["other"]) for row in rows_of(out)}
    assert found == {row: (rows[row], values[row]) for row in picked}
    assert verify(out).findings == ()
    assert freeze(out, tmp_path / "canary.parquet", 2) == 2
    again = {**settings, "canary": str(tmp_path / "canary.parquet")}
    again["data"] = {**settings["data"], "output": str(tmp_path / "again")}
    assert [audit.measured for audit in run(again).audits] == [0]
    published = read_published(str(out))
    corrections = Corrections(corrections_folder(out, None))
    for row in (1, 3):
        corrections.keep(published, 0, row, published.step("tone"), "good")
    corrections.keep(published, 0, 1, published.step("tone"), None)
    said = corrections.said_of(published.step("tone"), ["text"])
    assert said is not None
    assert said.column("text").to_pylist() == [rows[6]]
    measured = glmbatch.evaluate({**settings, "steps": [CLASSIFY]}, str(source))
    assert measured.steps[0].counts.scored == 5
    del settings["data"]["where"]
    settings["data"] |= {"rows_per_fragment": 3, "output": str(tmp_path / "parts")}
    run(settings)
    written = pq.read_table(tmp_path / "parts").schema
    assert (written.field("text").type, written.field("other").type) == (TEXT, expected)
    parts = {row["id"]: row["other"] for row in rows_of(tmp_path / "parts")}
    assert parts == dict(enumerate(values))
    assert verify(tmp_path / "parts").findings == ()


def test_a_compacted_delta_table_is_filtered(
    job_settings: Settings, out: Path, rows: list[str], tmp_path: Path
) -> None:
    """Delta Lake's own compaction writes texts as views."""
    for part in range(2):
        ids = range(4 * part, 4 * part + 4)
        batch = pa.table({"id": ids, "text": [rows[number] for number in ids]})
        write_deltalake(tmp_path / "in", batch, mode="append")
    DeltaTable(tmp_path / "in").optimize.compact()
    run(job_settings(steps=[CLASSIFY], data__where="id in (1, 3, 6)"))
    assert sorted(row["id"] for row in rows_of(out)) == [1, 3, 6]
    assert verify(out).findings == ()
