"""A Delta Lake table as output: each publication is one commit, read by DuckDB and pandas."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from glmbatch.errors import InputError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.tables.delta import APPLICATION, table_files
from glmbatch.ledger.tables.table import commit_table
from glmbatch.ledger.tables.types import DELTA, table_schema
from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.support import Settings, Write


@pytest.fixture
def delta_job(job_settings: Settings) -> Callable[..., JobConfig]:
    """A job with one classify step whose output is a Delta table."""

    def job(**overrides: Any) -> JobConfig:
        settings = job_settings(**{"data__format": "delta", **overrides})
        return JobConfig.model_validate({**settings, "steps": settings["steps"][:1]})

    return job


def texts(out: Path) -> list[str]:
    return sorted(DeltaTable(out).to_pyarrow_table(columns=["text"]).column("text").to_pylist())


def test_pandas_and_duckdb_read_rows_answers_and_partitions(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("day=1/a b.parquet", {"text": rows[:12], "id": pa.array(range(12), pa.uint8())})
    write_source("day=2%2F3/b.parquet", {"text": rows[12:], "id": pa.array(range(11), pa.uint8())})
    run_job(delta_job())
    table = DeltaTable(tmp_path / "out")
    frame = table.to_pandas().sort_values(["day", "id"])
    assert frame.text.tolist() == rows
    assert frame.day.tolist() == ["1"] * 12 + ["2/3"] * 11
    assert set(frame.mood) <= {"good", "bad", "so so"}
    published = table.to_pyarrow_dataset()  # noqa: F841 - DuckDB finds it by its name
    counted = duckdb.sql(
        "select day, count(*), max(id) from published group by day order by day"
    ).fetchall()
    assert counted == [("1", 12, 11), ("2/3", 11, 10)]
    assert verify(tmp_path / "out").findings == ()


def test_each_run_is_one_commit_and_is_never_repeated(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:8]})
    write_source("b.parquet", {"text": rows[8:16]})
    run_job(delta_job())
    run_job(delta_job())
    assert DeltaTable(tmp_path / "out").version() == 0
    write_source("b.parquet", {"text": rows[9:17]})
    assert run_job(delta_job()).computed == 1, "the answers in the table are reused"
    table = DeltaTable(tmp_path / "out")
    assert (table.version(), table.transaction_version(APPLICATION)) == (1, 2)
    assert texts(tmp_path / "out") == sorted(rows[:8] + rows[9:17])
    assert table_files(tmp_path / "out") == {file.output_name for file in manifest(tmp_path).files}
    old = DeltaTable(tmp_path / "out", version=0).to_pyarrow_table().column("text").to_pylist()
    assert sorted(old) == sorted(rows[:16]), "the version before can still be read completely"
    added, removed = actions(tmp_path / "out", 1)
    assert len(added) == len(removed) == 1
    # Delta's own `vacuum` keeps files that do not belong to the table.
    gone = table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert [Path(name).name for name in gone] == removed
    assert verify(tmp_path / "out").findings == ()
    assert not run_job(delta_job()).computed


def manifest(tmp_path: Path) -> Any:
    found = Ledger(tmp_path / "out").manifest()
    assert found is not None
    return found


def actions(out: Path, version: int) -> tuple[list[str], list[str]]:
    lines = [
        json.loads(line)
        for line in (out / f"_delta_log/{version:020}.json").read_text().splitlines()
    ]
    return [line["add"]["path"] for line in lines if "add" in line], [
        line["remove"]["path"] for line in lines if "remove" in line
    ]


def test_the_next_run_completes_a_killed_publication(
    write_source: Write,
    delta_job: Callable[..., JobConfig],
    tmp_path: Path,
    rows: list[str],
    monkeypatch: Any,
) -> None:
    write_source("a.parquet", {"text": rows[:8]})
    run_job(delta_job())
    write_source("a.parquet", {"text": rows[3:11]})

    def killed(*args: Any, **options: Any) -> None:
        commit_table(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.ledger.publication.commit_table", killed)
        run_job(delta_job())
    assert texts(tmp_path / "out") == sorted(rows[3:11])
    assert [
        finding.kind
        for finding in verify(tmp_path / "out").findings
        if "is only in" in finding.what
    ] == ["wrong"] * 2
    assert not run_job(delta_job()).computed
    assert texts(tmp_path / "out") == sorted(rows[3:11])
    assert verify(tmp_path / "out").findings == ()


@pytest.mark.slow
def test_a_reader_sees_one_version_or_the_other(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    def night(number: int) -> list[str]:
        return [f"file {file} row {row} of night {number}" for file in range(6) for row in range(4)]

    nights = [sorted(night(number)) for number in range(4)]
    seen: list[list[str]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(texts(tmp_path / "out"))

    reader = threading.Thread(target=read)
    for number in range(4):
        for file in range(6):
            write_source(f"{file}.parquet", {"text": night(number)[4 * file : 4 * file + 4]})
        run_job(delta_job())
        if not number:
            reader.start()
    stop.set()
    reader.join()
    assert all(each in nights for each in seen), "never mixed, never a file missing"
    assert seen[0] == nights[0]
    assert len({tuple(each) for each in seen}) > 1, "it read while versions were published"


def test_a_new_column_joins_the_table_while_other_files_stay(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:3]})
    run_job(delta_job())
    write_source("b.parquet", {"text": rows[3:5], "stars": [4, 5]})
    run_job(delta_job())
    table = DeltaTable(tmp_path / "out").to_pyarrow_table().sort_by("text")
    assert sorted(table.column("stars").to_pylist(), key=str) == [4, 5, None, None, None]
    added, removed = actions(tmp_path / "out", DeltaTable(tmp_path / "out").version())
    assert (len(added), len(removed)) == (1, 0)


def test_an_output_becomes_a_table_and_stays_one(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:9]})
    run_job(delta_job(data__format="parquet"))
    plain = {path.name for path in (tmp_path / "out").glob("a-*.parquet")}
    assert not run_job(delta_job()).computed
    assert texts(tmp_path / "out") == sorted(rows[:9])
    assert not plain & {path.name for path in (tmp_path / "out").glob("a-*.parquet")}
    assert verify(tmp_path / "out").findings == ()
    with pytest.raises(InputError, match=r"is a Delta table. Set data.format"):
        run_job(delta_job(data__format="parquet"))


def test_types_that_delta_lacks_are_widened_or_refused() -> None:
    stamp = pa.timestamp("ns", "Europe/Berlin")
    kinds = {
        pa.uint8(): pa.int16(),
        pa.uint32(): pa.int64(),
        pa.null(): pa.string(),
        pa.dictionary(pa.int8(), pa.large_string()): pa.string(),
        pa.large_binary(): pa.binary(),
        pa.binary(16): pa.binary(),
        pa.date64(): pa.date32(),
        stamp: pa.timestamp("us", "UTC"),
        pa.large_list(pa.uint16()): pa.list_(pa.int32()),
        pa.struct([("a b", pa.float32()), ("c", stamp)]): pa.struct(
            [("a b", pa.float32()), ("c", pa.timestamp("us", "UTC"))]
        ),
        pa.map_(pa.string(), pa.uint8()): pa.map_(pa.string(), pa.int16()),
        pa.decimal128(10, 2): pa.decimal128(10, 2),
    }
    for kind, delta in kinds.items():
        assert table_schema(DELTA, "a", pa.schema([("x", kind)])).field("x").type == delta
    for kind in (
        pa.uint64(),
        pa.duration("s"),
        pa.time64("us"),
        pa.float16(),
        pa.list_(pa.uint64()),
        pa.struct([]),
    ):
        with pytest.raises(
            InputError,
            match=r"^a: column 'x' has the type .* Delta Lake does not have",
        ):
            table_schema(DELTA, "a", pa.schema([("x", kind)]))


def test_files_that_do_not_form_one_table_are_refused(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("day=1/a.parquet", {"text": rows[:3], "n": [1, 2, 3]})
    write_source("day=2/b.parquet", {"text": rows[:3], "n": ["1", "2", "3"]})
    with pytest.raises(InputError, match=r"'n' has the type string, but int64 in .*a.parquet"):
        run_job(delta_job())
    write_source("b.parquet", {"text": rows[:3], "n": [1, 2, 3]})
    (tmp_path / "in" / "day=2" / "b.parquet").unlink()
    with pytest.raises(InputError, match=r"one set. Set data.format to parquet"):
        run_job(delta_job())
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_file_that_would_lose_nanoseconds_is_left_out(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    fine = pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, 678)] * 3, pa.timestamp("ns"))
    write_source("a.parquet", {"text": rows[:3], "at": fine})
    write_source("b.parquet", {"text": rows[:3], "at": pa.array([1, 2, 3], pa.timestamp("ns"))})
    summary = run_job(delta_job(max_error_rate=1.0))
    assert (
        DeltaTable(tmp_path / "out").to_pyarrow_table().column("at").to_pylist()
        == fine.cast("timestamp[us]").to_pylist()
    )
    assert "column 'at' as timestamp[us]: Casting" in summary.unusable[0].reason
    assert pq.read_metadata(next((tmp_path / "out").glob("a-*.parquet"))).num_rows == 3
    assert verify(tmp_path / "out").findings == ()


def test_a_full_snapshot_may_change_types(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("day=1/a.parquet", {"text": rows[:3], "at": ["soon"] * 3})
    run_job(delta_job())
    times = pa.array([datetime.datetime(2026, 1, 2)] * 3, pa.timestamp("us"))
    write_source("day=1/a.parquet", {"text": rows[:3], "at": times})
    run_job(delta_job())
    assert (
        DeltaTable(tmp_path / "out").to_pyarrow_table().column("at").to_pylist()
        == times.to_pylist()
    )
    (tmp_path / "in/day=1/a.parquet").unlink()
    write_source("b.parquet", {"text": rows[:3], "at": times})
    with pytest.raises(
        InputError, match=r"partition columns are \['day'\], those of this run \[\]"
    ):
        run_job(delta_job(data__missing_sources="drop"))
    assert verify(tmp_path / "out").sound


def test_a_type_other_than_in_kept_files_is_refused(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:3], "n": [1, 2, 3]})
    run_job(delta_job())
    (tmp_path / "in/a.parquet").unlink()
    write_source("b.parquet", {"text": rows[:3], "n": ["1", "2", "3"]})
    before = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="column 'n' has the type"):
        run_job(delta_job())
    write_source("b.parquet", {"text": rows[:3], "N": [1, 2, 3]})
    with pytest.raises(InputError, match=r"cannot have both columns '[nN]' and '[nN]'"):
        run_job(delta_job())
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_foreign_table_is_left_alone(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:3]})
    write_deltalake(tmp_path / "out", pa.table({"mine": [1]}))
    for form, seen in (("delta", "did not write"), ("parquet", "is a Delta table")):
        with pytest.raises(InputError, match=seen):
            run_job(delta_job(data__format=form))
    assert DeltaTable(tmp_path / "out").to_pyarrow_table().column("mine").to_pylist() == [1]


def test_rows_of_others_are_not_removed(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:8]})
    run_job(delta_job())
    table = DeltaTable(tmp_path / "out")
    write_deltalake(table, table.to_pyarrow_table().slice(0, 1), mode="append")
    write_source("b.parquet", {"text": rows[8:12]})
    with pytest.raises(InputError, match="others wrote to the Delta table"):
        run_job(delta_job())
    found = [finding.what for finding in verify(tmp_path / "out").findings]
    assert "others wrote to the Delta table" in found[0]
    assert found[1:] == ["is only in the table"]
    assert len(texts(tmp_path / "out")) == 9
    DeltaTable(tmp_path / "out").restore(0)
    run_job(delta_job())
    assert texts(tmp_path / "out") == sorted(rows[:12])


def test_an_empty_log_after_a_kill_starts_over(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:3]})
    (tmp_path / "out/_delta_log").mkdir(parents=True)
    run_job(delta_job())
    assert texts(tmp_path / "out") == sorted(rows[:3])


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", bytes(99), b"\xff\xfe", b'{"add": {"path": 1}}']
)
def test_a_damaged_log_is_named_and_may_be_moved_away(
    content: bytes,
    write_source: Write,
    delta_job: Callable[..., JobConfig],
    out: Path,
    rows: list[str],
) -> None:
    write_source("a.parquet", {"text": rows[:3]})
    gone = write_source("b.parquet", {"text": rows[3:5]})
    run_job(delta_job())
    gone.unlink()
    (log,) = (out / "_delta_log").glob("*.json")
    log.write_bytes(content)
    for call in (lambda: verify(out), lambda: run_job(delta_job())):
        with pytest.raises(
            InputError, match=r"Move its _delta_log away.*set data\.output\."
        ) as told:
            call()
        assert "unknown>" not in str(told.value)
    (out / "_delta_log").rename(out.with_name("log"))
    assert run_job(delta_job()).computed == 0
    assert texts(out) == sorted(rows[:5])
    assert verify(out).sound


@pytest.mark.parametrize("form", ["parquet", "delta"])
def test_files_of_a_killed_publication_are_deleted_later(
    write_source: Write,
    delta_job: Callable[..., JobConfig],
    tmp_path: Path,
    rows: list[str],
    form: str,
) -> None:
    write_source("a.parquet", {"text": rows[:20]})

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.ledger.publication.write_quarantine", killed)
        run_job(delta_job(data__format=form))
    moved = {path.name for path in (tmp_path / "out").glob("a-*.parquet")}
    assert len(moved) == 3
    assert run_job(delta_job(data__format=form, data__rows_per_fragment=15)).computed == 0
    left = {path.name for path in (tmp_path / "out").glob("a-*.parquet")}
    names = {file.output_name for file in manifest(tmp_path).files}
    assert names <= left
    assert left - names == (moved if form == "delta" else set()), (
        "an older version of the table keeps its own"
    )
    assert verify(tmp_path / "out").findings == ()


def test_columns_that_do_not_go_out_may_have_any_type(
    write_source: Write, delta_job: Callable[..., JobConfig], tmp_path: Path, rows: list[str]
) -> None:
    lengths = pa.array([1, 2], pa.duration("s"))
    write_source("a.parquet", {"text": rows[:2], "lasts": lengths, "note": [1, 2]})
    write_source("b.parquet", {"text": rows[2:4], "lasts": lengths, "note": ["x", "y"]})
    for columns in (None, ["text", "lasts"], ["text", "note"]):
        with pytest.raises(
            InputError, match=r"[Oo]r (leave the column out with )?data\.columns|note"
        ):
            run_job(delta_job(data__columns=columns))
    run_job(delta_job(data__columns=["text"]))
    assert texts(tmp_path / "out") == sorted(rows[:4])
    assert verify(tmp_path / "out").findings == ()
