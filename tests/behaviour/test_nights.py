"""Successive runs over one output: what they replace, keep and recompute."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import InputError
from glmbatch.report.text import describe
from tests.support import (
    GENERATE,
    Settings,
    Write,
    assert_manifest_lists_what_is_there,
    column_of,
    read_quarantine,
    rows_of,
    run,
)

pytestmark = pytest.mark.slow


def test_a_second_run_computes_nothing_and_says_so(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y", None]})
    first = run(job_settings(max_error_rate=0.5))
    second = run(job_settings(max_error_rate=0.5, runtime__max_slots=1))
    assert (first.computed, second.computed) == (4, 0)
    assert "no inference was executed and no model was loaded" in describe(second)
    assert second.samples == (), "no file of this run could give one"
    (tmp_path / "in" / "a.parquet").rename(tmp_path / "in" / "renamed.parquet")
    assert run(job_settings(max_error_rate=0.5)).computed == 0


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_missing_or_damaged_answers_are_recomputed(
    write_source: Write, job_settings: Settings, damage: str, out: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y", "z"]})
    run(job_settings())
    before = rows_of(out)
    for path in [*out.glob("_glmbatch/answers/*"), *out.glob("*.parquet")]:
        content = path.read_bytes()
        path.unlink()
        if damage == "changed":
            path.write_bytes(content[:-1] + b"X")
    assert run(job_settings()).computed == 6
    assert rows_of(out) == before


def test_a_damaged_published_file_is_rebuilt(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y"]})
    run(job_settings())
    published = out / "a-0000000000.parquet"
    whole = published.read_bytes()
    published.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    assert run(job_settings()).computed == 0
    assert pq.read_table(published).equals(pq.read_table(pa.BufferReader(whole)))
    assert_manifest_lists_what_is_there(out)


def test_a_new_day_is_added_to_earlier_days(
    write_source: Write, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    write_source("day=1/a.parquet", {"text": ["one"]})
    run(job_settings())
    write_source("day=2/a.parquet", {"text": ["two"]})
    second = run(job_settings(data__input=str(tmp_path / "in" / "*" / "*.parquet")))
    assert second.computed == 2
    assert column_of(out, "text") == ["one", "two"]
    only = job_settings(data__input=str(tmp_path / "in" / "day=2*" / "*.parquet"))
    assert run(only).computed == 0
    assert column_of(out, "text") == ["one", "two"]


def test_a_run_over_one_day_keeps_earlier_days(
    write_source: Write, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    for day in (1, 2):
        write_source(f"day={day}/a.parquet", {"text": [f"of day {day}", None]})
        run(job_settings(data__input=str(tmp_path / "in" / f"day={day}"), max_error_rate=0.5))
    assert column_of(out, "text") == ["of day 1", None, "of day 2", None]
    listed = {line["source"] for line in read_quarantine(out)}
    assert listed == {"day=1/a.parquet", "day=2/a.parquet"}


def test_a_renamed_file_is_published_once(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    source = write_source("a.parquet", {"text": ["x", "y"]})
    run(job_settings())
    source.rename(source.with_name("b.parquet"))
    assert run(job_settings()).computed == 0
    assert column_of(out, "text") == ["x", "y"]
    assert_manifest_lists_what_is_there(out)


def test_a_renamed_step_renames_its_columns(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y"]})
    settings = job_settings()
    settings["steps"] = [{**GENERATE, "prompt_template": "{text}"}]
    run(settings)
    settings["steps"][0]["name"] = "answer"
    run(settings)
    for row in rows_of(out):
        assert row["answer"] is not None
        assert "reply" not in row


def test_larger_fragments_replace_smaller_ones(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": [f"row {n}" for n in range(20)]})
    run(job_settings())
    run(job_settings(data__rows_per_fragment=100))
    assert column_of(out, "text") == [f"row {n}" for n in range(20)]


def test_an_output_never_mixes_two_settings(
    write_source: Write, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    write_source("day=1/a.parquet", {"text": ["one"]})
    write_source("day=2/a.parquet", {"text": ["two"]})
    run(job_settings())
    settings = job_settings(data__input=str(tmp_path / "in" / "day=2*" / "*.parquet"))
    settings["steps"][1]["max_tokens"] = 3
    message = r"day=1/a-0000000000\.parquet was answered with other settings"
    with pytest.raises(InputError, match=message):
        run(settings)
    settings["data"]["input"] = str(tmp_path / "in")
    assert run(settings).computed == 2
    assert set(column_of(out, "text")) == {"one", "two"}


def test_an_output_belongs_to_one_input(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("one/a.parquet", {"text": ["x"]})
    write_source("two/a.parquet", {"text": ["y"]})
    run(job_settings(data__input=str(tmp_path / "in" / "one")))
    message = r"holds the answers for .*in/one.*Set data\.output to another folder"
    with pytest.raises(InputError, match=message):
        run(job_settings(data__input=str(tmp_path / "in" / "two")))


def test_a_limited_run_does_not_replace_all_rows(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": [f"row {n}" for n in range(20)]})
    run(job_settings(data__limit=3))
    assert len(rows_of(out)) == 3
    run(job_settings())
    with pytest.raises(InputError, match=r"a run with data\.limit would replace them"):
        run(job_settings(data__limit=3))
    assert len(rows_of(out)) == 20


def test_a_limited_run_may_replace_another_limited_run(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["x"] * 3})
    write_source("b.parquet", {"text": ["y"] * 3})
    run(job_settings(data__limit=5))
    settings = job_settings(data__limit=2)
    settings["steps"][0]["prompt_template"] = "Is it good? {text}"
    run(settings)
    assert len(rows_of(out)) == 2
