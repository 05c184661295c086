"""A Delta table as input: one version, its new files alone, and what it removes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from glmbatch.cli.plan import describe_plan
from glmbatch.errors import InputError
from glmbatch.ledger.input import cutting
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import write_manifest
from glmbatch.ledger.verification import verify
from glmbatch.report.summary import Summary
from glmbatch.report.text import describe
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.stores import Store
from tests.support import CLASSIFY, Settings, column_of, rows_of, run

Night = Callable[..., Summary]


def rows(*numbers: int, **others: Any) -> pa.Table:
    columns = {"id": list(numbers), "text": [f"row {number}" for number in numbers]}
    return pa.table({**columns, **{name: [value] * len(numbers) for name, value in others.items()}})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of two files, each from a commit of its own."""
    folder = tmp_path / "in"
    write_deltalake(folder, rows(1, 2, 3))
    write_deltalake(folder, rows(4, 5), mode="append")
    return folder


@pytest.fixture
def night(job_settings: Settings) -> Night:
    def one(**overrides: Any) -> Summary:
        return run(job_settings(steps=[dict(CLASSIFY)], data__id_column="id", **overrides))

    return one


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the input's files that are looked at."""
    names: list[str] = []
    look = cutting._Looker._at

    def recording(self: Any, name: str, given: Any) -> Any:
        names.append(name)
        return look(self, name, given)

    monkeypatch.setattr(cutting._Looker, "_at", recording)
    return names


def ids(output: Path) -> list[int]:
    return sorted(column_of(output, "id"))


def sound(output: Path) -> None:
    assert not verify(output).findings, verify(output)


def add(folder: Path, *names: str, rows: pa.Table) -> None:
    """Add files of the same `rows` in a commit by hand, for what deltalake does not write."""
    number = len(list((folder / "_delta_log").glob("0*.json")))
    lines = []
    for name in names:
        pq.write_table(rows, folder / name)
        entry = {"path": name, "partitionValues": {}, "size": (folder / name).stat().st_size}
        lines.append(json.dumps({"add": {**entry, "modificationTime": 1, "dataChange": True}}))
    (folder / "_delta_log" / f"{number:020}.json").write_text("\n".join(lines))


def test_reads_the_live_files_of_one_version(table: Path, night: Night, out: Path) -> None:
    DeltaTable(table).delete("id = 2")
    summary = night()
    assert ids(out) == [1, 3, 4, 5]
    assert str(summary.version) == "version 2 of the Delta table"
    assert "reads version 2 of the Delta table" in describe(summary)
    manifest = Ledger(out).manifest()
    assert manifest is not None
    assert manifest.version == summary.version
    sound(out)


def test_plan_names_the_version(table: Path, job_settings: Settings) -> None:
    plan = preview(JobConfig.model_validate(job_settings(data__version=0)))
    assert "reads version 0 of the Delta table" in describe_plan(plan)
    assert plan.rows == 3


def test_only_new_files_are_looked_at(
    table: Path, night: Night, out: Path, opened: list[str]
) -> None:
    night()
    opened.clear()
    write_deltalake(table, rows(6), mode="append")
    summary = night()
    assert len(opened) == 1
    assert (summary.unchanged_sources, summary.steps[0].computed) == (2, 1)
    assert ids(out) == [1, 2, 3, 4, 5, 6]
    sound(out)


def test_rows_move_and_go_with_their_files(table: Path, night: Night, out: Path) -> None:
    night()
    DeltaTable(table).delete("id = 1")
    assert night().steps[0].computed == 0
    assert ids(out) == [2, 3, 4, 5]
    DeltaTable(table).optimize.compact()
    assert night().steps[0].computed == 0
    assert len(rows_of(out)) == 4
    DeltaTable(table).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert night().steps[0].computed == 0
    sound(out)
    write_deltalake(table, rows(9), mode="overwrite")
    night()
    assert ids(out) == [9]
    sound(out)


def test_a_pinned_version_stays(table: Path, night: Night, out: Path) -> None:
    night(data__version=0)
    assert ids(out) == [1, 2, 3]
    night()
    assert ids(out) == [1, 2, 3, 4, 5]
    night(data__version=0)
    assert ids(out) == [1, 2, 3]
    with pytest.raises(InputError, match=r"has no version 7; the newest is 1"):
        night(data__version=7)


def test_added_and_wider_columns_are_those_of_the_table(
    table: Path, night: Night, out: Path, job_settings: Settings, opened: list[str]
) -> None:
    night()
    opened.clear()
    more = rows(6, lang="de", extra=1.5)
    write_deltalake(table, more, mode="append", schema_mode="merge")
    summary = night()
    # The files of a table that has changed are opened once, and nothing is asked again.
    assert len(set(opened)) == 3
    assert summary.steps[0].computed == 1
    assert {row["lang"] for row in rows_of(out)} == {None, "de"}
    for path in out.glob("[!_]*.parquet"):
        assert pq.read_schema(path).field("extra").type == pa.float64()
    sound(out)
    opened.clear()
    DeltaTable(table).alter.set_column_metadata("lang", {"comment": "of the text"})
    assert night().unchanged_sources == 3
    assert not opened
    # A prompt may use the column too: rows of older files have no value for it.
    step = {**CLASSIFY, "prompt_template": "{lang}: {text}"}
    other = {"data__output": str(out.parent / "other"), "max_error_rate": 1.0}
    assert run(job_settings(steps=[step], **other)).faulty_rows == 5
    where = {**other, "data__output": str(out.parent / "some"), "data__where": "lang is null"}
    assert run(job_settings(steps=[dict(CLASSIFY)], **where)).rows == 5
    sound(out.parent / "some")


def test_reads_a_widened_type_in_the_wider_one(table: Path, night: Night, out: Path) -> None:
    narrow = pa.table({"id": pa.array([6, 7], pa.int32()), "text": ["six", None]})
    add(table, "narrow.parquet", rows=narrow)
    night(max_error_rate=0.5)
    assert ids(out) == [1, 2, 3, 4, 5, 6, 7]
    for path in out.glob("[!_]*.parquet"):
        assert pq.read_schema(path).field("id").type == pa.int64()
    sound(out)


def test_a_type_that_does_not_widen_leaves_the_file_out(
    table: Path, night: Night, out: Path
) -> None:
    add(table, "other.parquet", rows=pa.table({"id": ["six"], "text": ["six"]}))
    summary = night(max_error_rate=0.5)
    assert "column 'id' is string, and int64 in the table" in summary.unusable[0].reason
    assert ids(out) == [1, 2, 3, 4, 5]


def test_where_leaves_partitions_unopened(
    tmp_path: Path, night: Night, out: Path, opened: list[str]
) -> None:
    days = pa.table({"id": [1, 2, 3], "text": list("abc"), "day": ["26", "27", None]})
    write_deltalake(tmp_path / "in", days, partition_by=["day"])
    summary = night(data__where="day = '27'")
    assert (ids(out), len(opened)) == ([2], 1)
    assert summary.filtered is not None
    assert summary.filtered.sources == 2
    # Rows that only the condition leaves out stay; those that are deleted go, in any partition.
    night(data__where="day = '26'")
    assert ids(out) == [1, 2]
    DeltaTable(tmp_path / "in").delete("day = '27'")
    night(data__where="day = '26'")
    assert ids(out) == [1]
    sound(out)


def test_where_leaves_files_unopened_by_the_logs_bounds(
    table: Path, night: Night, out: Path, opened: list[str]
) -> None:
    summary = night(data__where="id >= 5")
    assert (ids(out), len(opened)) == ([5], 1)
    assert summary.filtered is not None
    assert (summary.filtered.sources, summary.filtered.rows) == (1, 1)
    sound(out)
    night(data__where="id < 3")
    assert ids(out) == [1, 2, 5]
    sound(out)
    with pytest.raises(InputError, match=r"2 files, and no value that the table records meets"):
        night(data__where="id > 90")


@pytest.mark.parametrize("pinned", [None, 1])
def test_a_run_stays_at_its_version(
    table: Path, night: Night, out: Path, monkeypatch: pytest.MonkeyPatch, pinned: int | None
) -> None:
    """Another process appends and compacts after the first planning, and the run plans again."""
    night()
    from glmbatch.run import job

    prepare = job.prepare_models

    def changing(*arguments: Any) -> Any:
        write_deltalake(table, rows(9), mode="append")
        DeltaTable(table).optimize.compact()
        return prepare(*arguments)

    monkeypatch.setattr(job, "prepare_models", changing)
    # Another size of fragments, so that the unchanged files are planned again.
    summary = night(data__rows_per_fragment=2, data__version=pinned)
    assert str(summary.version) == "version 1 of the Delta table"
    assert ids(out) == [1, 2, 3, 4, 5]
    sound(out)


def test_a_vacuumed_version_is_refused(table: Path, night: Night) -> None:
    DeltaTable(table).optimize.compact()
    DeltaTable(table).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    with pytest.raises(InputError, match=r"is gone, but version 1 of the Delta table has it"):
        night(data__version=1)
    assert night().rows == 5


def test_a_file_of_another_size_is_left_out(table: Path, night: Night, out: Path) -> None:
    path = next(table.glob("*.parquet"))
    pq.write_table(pa.concat_tables([rows(11), rows(12), rows(13), rows(14)]), path)
    summary = night(max_error_rate=1.0)
    assert "bytes, but version 1 of the Delta table says" in summary.unusable[0].reason
    assert sorted(ids(out)) in ([1, 2, 3], [4, 5])


def test_ids_of_columns_mean_nothing_in_a_delta_table(
    tmp_path: Path, job_settings: Settings, out: Path
) -> None:
    names = {"id": pa.int64(), "text": pa.string()}
    numbered = []
    for number, (name, kind) in enumerate(names.items()):
        numbered.append(pa.field(name, kind, metadata={"PARQUET:field_id": str(number)}))
    columns = pa.table([[1, 2], ["a", "b"]], schema=pa.schema(numbered))
    for name in ("more", "most"):
        columns = columns.append_column(name, pa.array([name, name]))
    write_deltalake(tmp_path / "in", columns)
    step = {**CLASSIFY, "prompt_template": "{more}: {text}"}
    run(job_settings(steps=[step], data__id_column="id", on_error="raise"))
    assert [(row["more"], row["most"]) for row in rows_of(out)] == [("more", "most")] * 2
    sound(out)


def test_an_emptied_table_leaves_what_is_published(table: Path, night: Night, out: Path) -> None:
    night()
    DeltaTable(table).delete()
    with pytest.raises(InputError, match=r"has no files, so there are no rows to read"):
        night()
    assert ids(out) == [1, 2, 3, 4, 5]
    sound(out)


def test_verify_proves_that_the_version_is_covered(table: Path, night: Night, out: Path) -> None:
    night()
    manifest = Ledger(out).manifest()
    assert manifest is not None
    assert manifest.version is not None
    versions = {
        "has .*, of which no row is published": {"files": manifest.files[1:]},
        "does not have .*, of which rows": {"version": replace(manifest.version, number=0)},
        "version 9 of the Delta table cannot be read now": {
            "version": replace(manifest.version, number=9)
        },
    }
    for what, update in versions.items():
        write_manifest(out, manifest.model_copy(update=update))
        found = [str(finding) for finding in verify(out).findings]
        assert any(re.search(what, finding) for finding in found), found
    write_manifest(out, manifest)
    sound(out)


def test_our_own_delta_output_is_an_input(
    table: Path, night: Night, out: Path, job_settings: Settings
) -> None:
    night(data__format="delta")
    again = {**CLASSIFY, "name": "second"}
    for output_format in ("parquet", "delta"):
        second = out.parent / output_format
        places = {"data__input": str(out), "data__output": str(second)}
        summary = run(job_settings(steps=[again], data__format=output_format, **places))
        assert summary.rows == 5
        assert summary.version is not None
        assert {"mood", "second"} <= set(rows_of(second)[0])
        sound(second)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("in", r"lies inside the input|holds the input file"),
        ("in/answers", r"lies inside the input"),
        (".", r"holds the input file"),
    ],
)
def test_refuses_an_output_that_is_not_apart(
    table: Path, night: Night, place: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        night(data__output=str(table.parent / place))


def test_refuses_a_part_of_a_table(tmp_path: Path, night: Night) -> None:
    days = pa.table({"id": [1], "text": ["a"], "day": ["26"]})
    write_deltalake(tmp_path / "in" / "table", days, partition_by=["day"])
    for name in ("in", "in/table/day=26", "in/table/*/*.parquet"):
        with pytest.raises(InputError, match=r"Set data.input to this folder"):
            night(data__input=str(tmp_path / name), data__output=str(tmp_path / "apart"))
    with pytest.raises(InputError, match=r"is no table, so it has no version 3"):
        night(data__input=str(tmp_path / "plain"), data__version=3)


def test_three_new_files_of_many(tmp_path: Path, night: Night, opened: list[str]) -> None:
    folder = tmp_path / "in"
    write_deltalake(folder, rows(0))
    add(folder, *(f"{number}.parquet" for number in range(200)), rows=rows(1))
    night()
    opened.clear()
    for number in (101, 102, 103):
        write_deltalake(folder, rows(number), mode="append")
    summary = night()
    assert len(opened) == 3
    assert summary.unchanged_sources == 201


def test_a_night_over_a_table_in_a_store(
    store: Store, night: Night, job_settings: Settings, tmp_path: Path
) -> None:
    options = {"allow_http": "true", "conditional_put": "etag"}
    for number in range(3):
        write_deltalake(store.url("in"), rows(number), mode="append", storage_options=options)
    places = {"data__input": store.url("in"), "data__output": store.url("out")}
    night(**places)
    write_deltalake(store.url("in"), rows(7), mode="append", storage_options=options)
    store.requests.clear()
    summary = night(**places)
    assert (summary.unchanged_sources, summary.rows) == (3, 4)
    read = {request.key for request in store.requests if request.key.startswith("in/part")}
    assert len(read) == 1
    assert not verify(store.url("out")).findings


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_a_partition_by_times_is_read_and_not_compared(
    night: Night, out: Path, tmp_path: Path, zone: str | None
) -> None:
    times = pa.array([datetime(2026, 11, 27), datetime(2026, 11, 27, 1, 2, 3, 4), None])
    table = rows(1, 2, 3).append_column("seen", times.cast(pa.timestamp("us", zone)))
    write_deltalake(tmp_path / "in", table, partition_by=["seen"])
    night()
    assert ids(out) == [1, 2, 3]
    sound(out)
    with pytest.raises(InputError, match=r"'seen' is a time, and its folders .* Set data\.where\."):
        night(data__where="seen <= '2026-11-27'")
