"""Files that should stay published, and that others deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from pyiceberg.catalog import Catalog

from glmbatch.errors import InputError
from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.run.plan import plan_run
from glmbatch.settings.job import JobConfig
from tests.support import Settings, Write

Job = Callable[..., JobConfig]


@pytest.fixture(params=["parquet", "delta", "iceberg"])
def job(request: pytest.FixtureRequest, catalog: Catalog, job_settings: Settings) -> Job:
    """A job with one classify step over each format of output."""

    def job(**overrides: Any) -> JobConfig:
        name = "lake/shop.reviews" if request.param == "iceberg" else None
        table = {"data__format": request.param, "data__table": name, "max_error_rate": 1.0}
        settings = job_settings(**{**table, **overrides})
        return JobConfig.model_validate({**settings, "steps": settings["steps"][:1]})

    return job


def test_a_deleted_file_is_noticed_before_any_work(
    write_source: Write, job: Job, out: Path, rows: list[str]
) -> None:
    source = write_source("a.parquet", {"text": rows[:4]})
    write_source("b.parquet", {"text": rows[4:8]})
    run_job(job())
    (published,) = out.glob("a-*.parquet")
    content = source.read_bytes()
    published.unlink()
    source.unlink()
    with pytest.raises(InputError, match=r"a-.* is gone: others deleted it \(1 such f"):
        plan_run(job())
    source.write_bytes(content[:50])
    with pytest.raises(InputError, match=r"1 damaged \(a\.parquet\)\. Replace the damaged files"):
        plan_run(job())
    source.write_bytes(content)
    assert run_job(job()).computed == 0, "its answers are known"
    assert verify(out).findings == ()


def test_rows_of_a_deleted_file_may_be_dropped(
    write_source: Write, job: Job, out: Path, rows: list[str]
) -> None:
    source = write_source("a.parquet", {"text": rows[:4]})
    write_source("b.parquet", {"text": rows[4:8]})
    run_job(job())
    source.unlink()
    next(out.glob("a-*.parquet")).unlink()
    with pytest.raises(InputError, match=r"or set data\.missing_sources to drop"):
        plan_run(job())
    assert run_job(job(data__missing_sources="drop")).rows == 4
    assert verify(out).findings == ()


@pytest.mark.parametrize("job", ["delta"], indirect=True)
def test_rows_deleted_by_others_do_not_come_back(
    write_source: Write, job: Job, out: Path, rows: list[str]
) -> None:
    for day in (1, 2):
        write_source(f"day={day}/a.parquet", {"text": rows[4 * day : 4 * day + 4]})
    run_job(job())
    DeltaTable(out).delete("day = '1'")
    for settings in ({}, {"data__where": "day = '2'"}):
        with pytest.raises(InputError, match=r"others deleted rows of the Delta table \(day=1/a-"):
            plan_run(job(**settings))
    assert any("others deleted" in str(fault) for fault in verify(out).findings)
    source = write_source("day=1/a.parquet", {"text": rows[4:6]})
    assert run_job(job()).rows == 6, "its source says less now, and was read again"
    DeltaTable(out).delete("day = '1'")
    source.unlink()
    assert run_job(job(data__missing_sources="drop")).rows == 4
    assert verify(out).findings == ()


@pytest.mark.parametrize("job", ["delta"], indirect=True)
def test_an_optimized_table_can_be_restored_after_a_vacuum(
    write_source: Write, job: Job, out: Path, rows: list[str]
) -> None:
    write_source("a.parquet", {"text": rows[:4]})
    write_source("b.parquet", {"text": rows[4:8]})
    run_job(job())
    DeltaTable(out).optimize.compact()
    DeltaTable(out).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    with pytest.raises(InputError, match="without the files that a vacuum has deleted"):
        plan_run(job())
    DeltaTable(out).restore(0, ignore_missing_files=True)
    assert run_job(job()).computed == 0
    assert sorted(DeltaTable(out).to_pandas().text) == sorted(rows[:8])
    assert verify(out).findings == ()
