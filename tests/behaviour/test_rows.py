"""Every row comes out in its place, with its answers or the reason why it has none."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import AuditError, UnusableFile
from glmbatch.report.text import describe
from glmbatch.settings.job import JobConfig
from tests.support import (
    CLASSIFY,
    GENERATE,
    ROOT,
    Settings,
    Write,
    column_of,
    read_quarantine,
    rows_of,
    run,
)

pytestmark = pytest.mark.slow


def test_each_row_keeps_its_place_and_gets_its_answers(
    rows: list[str], write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("day=1/a.parquet", {"id": range(23), "text": rows})
    summary = run(job_settings())
    answered = rows_of(out)
    assert [row["text"] for row in answered] == rows
    for row in answered:
        assert row["mood"] in {"good", "bad", "so so"}
        scores = row["mood_scores"]
        assert math.isclose(sum(scores.values()), 1, abs_tol=1e-9)
        assert row["mood_score"] == max(scores.values()) == scores[row["mood"]]
        assert row["reply_finish_reason"] in {"stop", "length"}
        assert 0 <= row["reply_completion_tokens"] <= 6
        assert row["mood_error"] is row["reply_error_type"] is None
        assert len(row["reply_key"]) == 16
    assert (summary.rows, summary.faulty_rows, summary.fragments) == (23, 0, 3)
    assert sorted(os.listdir(out / "day=1")) == [
        "a-0000000000.parquet",
        "a-0000000008.parquet",
        "a-0000000016.parquet",
    ]


def test_columns_types_and_metadata_are_preserved(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    table = pa.table(
        {
            "text": pa.array(["一", "two", "三"], pa.large_string()),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "when": pa.array([0, 1, None], pa.timestamp("ms", "Asia/Shanghai")),
            "price": pa.array(["1.50", None, "2.25"]).cast(pa.decimal128(9, 2)),
            "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
            "nested": pa.array([{"a": [{"b": 1}]}, None, {"a": []}]),
            "pairs": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int8())),
            "blank": pa.nulls(3),
        }
    )
    noted = table.schema.field("text").with_metadata({b"note": b"kept"})
    schema = table.schema.set(table.schema.get_field_index("text"), noted)
    table = table.cast(schema.with_metadata({b"team": "数据".encode()}))
    write_source("a.parquet", table)
    run(job_settings())
    written = pq.read_table(out / "a-0000000000.parquet", partitioning=None)
    assert written.select(table.schema.names).equals(table)
    assert written.schema.metadata[b"team"] == "数据".encode()
    assert written.schema.field("text").metadata[b"note"] == b"kept"
    steps = JobConfig.model_validate(job_settings()).steps
    assert written.schema.names == [
        *table.schema.names,
        *steps[0].answer_columns,
        *steps[1].answer_columns,
    ]


def test_an_empty_table_gives_an_empty_table(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": pa.array([], pa.string())})
    summary = run(job_settings())
    written = pq.read_table(out / "a-0000000000.parquet")
    assert (summary.rows, written.num_rows) == (0, 0)
    assert "mood_scores" in written.schema.names


def test_a_bad_row_keeps_its_place_and_says_why(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    texts = ["fine", None, "", " \n", b"\xff\xfe".decode("latin-1"), "long " * 3000, "also fine"]
    write_source("a.parquet", {"id": [f"row-{n}" for n in range(7)], "text": texts})
    summary = run(job_settings(max_error_rate=0.9, data__id_column="id"))
    assert column_of(out, "text") == texts
    kinds = [None, "null_value", "empty_text", "empty_text", None, "too_long", None]
    assert column_of(out, "mood_error_type") == kinds
    later = "earlier_step_failed"
    assert column_of(out, "reply_error_type") == [None, later, later, later, None, later, None]
    for row in rows_of(out):
        assert (row["mood"] is None) == (row["mood_error"] is not None)
    lines = read_quarantine(out, step="mood")
    assert {line["source"] for line in lines} == {"a.parquet"}
    assert [line["row"] for line in lines] == [1, 2, 3, 5]
    assert [line["id"] for line in lines] == ["row-1", "row-2", "row-3", "row-5"]
    assert (summary.faulty_rows, summary.quarantined) == (4, True)
    assert "4 rows failed" in describe(summary)


def test_invalid_bytes_fail_only_their_row(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": pa.array([b"fine", b"\xff", "好".encode()])})
    run(job_settings(max_error_rate=0.5))
    assert column_of(out, "mood_error_type") == [None, "not_utf8", None]


def test_invalid_utf8_never_stops_the_run(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    broken = pa.array([b"fine", b"\xff", b"also fine"]).view(pa.string())
    write_source("a.parquet", {"text": broken, "id": broken})
    run(job_settings(max_error_rate=0.5, data__id_column="id"))
    (line,) = read_quarantine(out, step="mood")
    assert (line["row"], line["error_type"]) == (1, "not_utf8")


def damage_a_page(source: Path, row_group: int) -> None:
    """Change one byte of a row group. The footer shows no sign of it."""
    with pq.ParquetFile(source) as file:
        page = file.metadata.row_group(row_group).column(0).data_page_offset
    whole = source.read_bytes()
    source.write_bytes(whole[: page + 40] + bytes([whole[page + 40] ^ 1]) + whole[page + 41 :])


def test_a_damaged_page_costs_only_its_fragment(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    source = write_source(
        "a.parquet",
        {"text": [f"row {n}" for n in range(24)]},
        row_group_size=8,
        write_page_checksum=True,
    )
    damage_a_page(source, 1)
    with pytest.raises(UnusableFile, match=r"a\.parquet"):
        run(job_settings(on_error="raise"))
    summary = run(job_settings(max_error_rate=0.5))
    assert [fault.source for fault in summary.unusable] == ["a.parquet"]
    assert column_of(out, "text") == [f"row {n}" for n in [*range(8), *range(16, 24)]]
    assert read_quarantine(out)[0]["error_type"] == "unusable_file"


def test_damage_under_a_new_prompt_loses_no_rows(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    texts = [f"row {n}" for n in range(8)]
    source = write_source("a.parquet", {"text": texts}, write_page_checksum=True)
    write_source("b.parquet", {"text": texts})
    run(job_settings())
    published = column_of(out, "text")
    damage_a_page(source, 0)
    settings = job_settings(max_error_rate=0.9)
    settings["steps"][0]["prompt_template"] = "Mood? {text}"
    with pytest.raises(
        AuditError, match=r"answered with other settings.*1 damaged \(a\.parquet\)\. Replace"
    ):
        run(settings)
    assert column_of(out, "text") == published


def test_repeated_texts_are_asked_once(write_source: Write, job_settings: Settings) -> None:
    write_source("a.parquet", {"text": ["same", "other", "same", "same"]})
    settings = job_settings()
    settings["steps"] = [CLASSIFY]
    assert [step.computed for step in run(settings).steps] == [2]


def test_a_prompt_may_name_the_text_by_its_column(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"body": ["fine", " ", "long " * 3000]})
    settings = job_settings(data__text_column="body", max_error_rate=0.9)
    settings["steps"] = [{**GENERATE, "prompt_template": "{body}", "on_too_long": "truncate"}]
    run(settings)
    assert column_of(out, "reply_error_type") == [
        None,
        "empty_text",
        None,
    ]


def test_sampled_answers_do_not_depend_on_their_neighbours(
    rows: list[str], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    step = {"kind": "generate", "name": "reply", "max_tokens": 12, "temperature": 1.0, "top_p": 1.0}
    answers = []
    for size, slots in [(100, 1), (100, 16), (7, 3)]:
        out = tmp_path / f"out-{size}-{slots}"
        settings = job_settings(
            steps=[step],
            data__output=str(out),
            data__rows_per_fragment=size,
            runtime__max_slots=slots,
        )
        run(settings)
        answers.append(column_of(out, "reply"))
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 15


def test_a_model_that_loops_stops_looping(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": [f"row {row} 很好" for row in range(6)]})
    step = {"kind": "generate", "name": "reply", "max_tokens": 60}
    looping = re.compile(r"(.)\1{9}")
    run(job_settings(steps=[step]))
    before = rows_of(out)
    looped = [row for row in before if looping.search(row["reply"])]
    assert [row["reply_finish_reason"] for row in looped] == ["length"]

    step |= {"no_repeat_ngram_size": 3, "log_probs": True}
    summary = run(job_settings(steps=[step]))
    assert summary.computed == 6
    for old, new in zip(before, rows_of(out), strict=True):
        assert not looping.search(new["reply"])
        assert new["reply_log_prob"] < 0
        # An answer that repeats nothing stays as it was.
        assert (new["reply"] == old["reply"]) == (old not in looped)


def test_duckdb_finds_every_row_once_by_the_readme_glob(
    write_source: Write, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    write_source("day=1/a.parquet", {"text": [f"row {row}" for row in range(10)] + [None]})
    write_source("b.parquet", {"text": ["flat"]})
    run(job_settings(steps=[CLASSIFY], max_error_rate=0.5))
    glob = "out/**/*-??????????.parquet"
    assert glob in (ROOT / "docs/answers.md").read_text()
    table = f"read_parquet('{tmp_path}/{glob}', union_by_name=true)"
    assert duckdb.sql(f"select count(*) from {table}").fetchall() == [(12,)]
