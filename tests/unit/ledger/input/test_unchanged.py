"""Sources that did not change are left alone, and never wrongly."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import AuditError, UnusableFile
from glmbatch.ledger.fragments import read_fragment
from glmbatch.ledger.input import opening
from glmbatch.ledger.input.unchanged import is_sampled, receipts_of
from glmbatch.ledger.manifest import read_manifest, write_manifest
from glmbatch.ledger.verification import verify
from glmbatch.run.plan import plan_run
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from glmbatch.store import files, parquet
from glmbatch.store.files import digest_file, is_settled, version_stamp
from tests.support import CLASSIFY, Settings, Write, rows_of, run

TEXTS = ["很好", "bad thing", None, "so so"]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust stamps at once, as of files that are older than the clock's grain."""
    monkeypatch.setattr(files, "TICK_NS", -1)


@pytest.fixture
def settings(job_settings: Settings) -> Callable[..., dict[str, Any]]:
    def make(**overrides: Any) -> dict[str, Any]:
        chosen: dict[str, Any] = {"steps": [CLASSIFY], "max_error_rate": 0.5}
        return job_settings(**{**chosen, "data__recheck_share": 0.0, **overrides})

    return make


@pytest.fixture
def published(
    settings: Settings, write_source: Write, at_once: None, digested: list[str]
) -> Iterator[dict[str, Any]]:
    """The settings of a run that has published three files."""
    for name in ("a", "b", "c"):
        write_source(f"day=1/{name}.parquet", {"text": [f"{name} {text}" for text in TEXTS]})
    write_source("day=1/c.parquet", {"text": TEXTS})
    run(settings())
    digested.clear()
    yield settings()


def source(tmp_path: Path, name: str) -> Path:
    return tmp_path / "in" / "day=1" / f"{name}.parquet"


def test_unchanged_sources_are_not_read(
    published: dict[str, Any], digested: list[str], out: Path
) -> None:
    before = rows_of(out)
    summary = run(published)
    assert digested == []
    assert (summary.unchanged_sources, summary.computed) == (3, 0)
    assert (summary.rows, summary.fragments, summary.faulty_rows) == (12, 3, 1)
    step = summary.steps[0]
    assert (step.answers, step.reused, step.failed) == (12, 11, 1)
    assert sum(step.labels.values()) == 11
    assert summary.quarantined
    assert rows_of(out) == before
    assert verify(out).findings == ()


def test_a_new_file_is_the_only_one_read(
    published: dict[str, Any], write_source: Write, digested: list[str], out: Path
) -> None:
    write_source("day=2/d.parquet", {"text": ["new"]})
    summary = run(published)
    assert digested == ["d.parquet"]
    assert (summary.unchanged_sources, summary.rows, summary.computed) == (3, 13, 1)
    assert len(rows_of(out)) == 13


def test_a_touched_source_costs_one_digest(
    published: dict[str, Any], digested: list[str], tmp_path: Path
) -> None:
    os.utime(source(tmp_path, "a"), ns=(1, 1))
    assert run(published).unchanged_sources == 3
    assert digested == ["a.parquet"]
    assert run(published).unchanged_sources == 3
    assert digested == ["a.parquet"]


def test_rights_that_a_source_loses_are_lost(
    published: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    source(tmp_path, "a").chmod(0o600)
    assert run(published).unchanged_sources == 3
    assert (out / "day=1" / "a-0000000000.parquet").stat().st_mode & 0o077 == 0


def test_swapped_names_are_both_read(published: dict[str, Any], tmp_path: Path, out: Path) -> None:
    a, b = source(tmp_path, "a"), source(tmp_path, "b")
    a.rename(tmp_path / "aside")
    b.rename(a)
    (tmp_path / "aside").rename(b)
    assert run(published).unchanged_sources == 1
    assert verify(out).findings == ()


def test_other_settings_plan_all_sources(
    published: dict[str, Any], digested: list[str], settings: Settings, out: Path
) -> None:
    other = {**CLASSIFY, "labels": ["yes", "nope"]}
    summary = run(settings(steps=[other]))
    assert (summary.unchanged_sources, summary.rows) == (0, 12)
    assert digested == []  # the stamps say which bytes they are
    assert {row["mood"] for row in rows_of(out)} <= {"yes", "nope", None}
    assert run(settings(steps=[other], data__rows_per_fragment=2)).unchanged_sources == 0


@pytest.mark.parametrize("harm", ["delete", "flip", "replace"])
def test_a_harmed_published_file_is_rebuilt(
    published: dict[str, Any], out: Path, harm: str
) -> None:
    before = rows_of(out)
    path = out / "day=1" / "b-0000000000.parquet"
    content = bytearray(path.read_bytes())
    path.unlink()
    if harm == "flip":
        content[40] ^= 4
    if harm != "delete":
        path.write_bytes(content)
    summary = run(published)
    assert (summary.unchanged_sources, summary.computed) == (2, 0)
    assert rows_of(out) == before
    assert verify(out).findings == ()


def test_a_write_within_the_clocks_grain_is_digested(
    settings: Settings, write_source: Write, digested: list[str]
) -> None:
    write_source("a.parquet", {"text": ["one"]})
    run(settings())
    digested.clear()
    # The file was written just before the last look, so its stamp proves nothing.
    assert run(settings()).unchanged_sources == 1
    assert digested == ["a.parquet"]


def test_times_in_the_future_prove_nothing() -> None:
    now = time.time_ns()
    assert is_settled((1, now - 10**10, now - 10**10, 7), now)
    assert not is_settled((1, now + 10**12, now - 10**10, 7), now)
    assert not is_settled((1, now - 10**10, now - 10**6, 7), now)
    assert is_settled((1, now), now)  # a version in a store


def lie(out: Path, path: Path) -> None:
    """Let the manifest record the present stamp of `path`, whatever its bytes."""
    manifest = read_manifest(out)
    assert manifest is not None
    listed = []
    for file in manifest.files:
        is_it = file.source.endswith(path.name)
        listed.append(replace(file, stamp=version_stamp(path)) if is_it else file)
    write_manifest(out, manifest.model_copy(update={"files": tuple(listed)}))


def test_bytes_that_change_silently_are_found(
    published: dict[str, Any], settings: Settings, write_source: Write, tmp_path: Path, out: Path
) -> None:
    path = write_source("day=1/a.parquet", {"text": ["other", "bytes"]})
    lie(out, path)
    assert run(published).unchanged_sources == 3
    assert "day=1/a-0000000000.parquet" in str(verify(out).findings)
    summary = run(settings(data__recheck_share=1.0))
    assert summary.silently_changed == ("day=1/a.parquet",)
    assert (summary.unchanged_sources, summary.rechecked_sources) == (2, 2)
    assert verify(out).findings == ()


def test_the_share_of_rechecked_sources_is_the_one_set() -> None:
    drawn = sum(is_sampled(f"{number}.parquet", "run", 0.1) for number in range(10_000))
    assert 900 < drawn < 1100
    assert not any(is_sampled(f"{number}", "run", 0.0) for number in range(100))
    assert all(is_sampled(f"{number}", "run", 1.0) for number in range(100))


def test_a_source_replaced_while_it_is_read_is_read_again(
    published: dict[str, Any],
    write_source: Write,
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
) -> None:
    write_source("day=1/a.parquet", {"text": ["first"]})
    digest = opening.digest_file

    def slow(path: Path, *stamp: Any) -> str:
        result = digest(path, *stamp)
        if path.name == "a.parquet":  # between its stamp and the reading of its rows
            write_source("day=1/a.parquet", {"text": ["second", "and longer"]})
        return result

    with monkeypatch.context() as patch:
        patch.setattr(opening, "digest_file", slow)
        assert run(published).unusable[0].source == "day=1/a.parquet"
    summary = run(published)
    assert (summary.unchanged_sources, summary.unusable) == (2, ())
    assert [row["text"] for row in rows_of(out) if row["text"] == "second"] == ["second"]
    assert verify(out).findings == ()


def test_rows_of_unchanged_sources_count_in_audits(
    published: dict[str, Any], write_source: Write, settings: Settings, out: Path
) -> None:
    write_source("day=2/d.parquet", {"text": [None]})
    # One row of one fails, but two of thirteen in all.
    assert run(settings(max_error_rate=0.2)).faulty_rows == 2
    write_source("day=2/e.parquet", {"text": [None, None]})
    with pytest.raises(AuditError, match="4 of 15 rows failed"):
        run(settings(max_error_rate=0.2))
    manifest = read_manifest(out)
    assert manifest is not None
    (receipt,) = receipts_of(manifest.files)
    assert (receipt.rows, receipt.faults) == (13, {"null_value": 2})


def test_a_failed_row_under_raise_is_still_refused(
    published: dict[str, Any], settings: Settings
) -> None:
    with pytest.raises(Exception, match="text is null"):
        run(settings(on_error="raise"))


def test_the_plan_counts_unchanged_sources(
    published: dict[str, Any], write_source: Write, digested: list[str]
) -> None:
    write_source("day=2/d.parquet", {"text": ["new"]})
    plan = preview(JobConfig.model_validate(published))
    assert (plan.unchanged_sources, plan.rows) == (3, 13)
    assert digested == ["d.parquet"]
    counts = {step.source: (step.rows, step.to_run, step.reused) for step in plan.steps}
    assert counts == {"day=2/d.parquet": (1, 1, 0), "3 unchanged files": (12, 0, 11)}


def test_a_name_for_an_unchanged_files_place_is_refused(
    published: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    pq.write_table(pq.read_table(source(tmp_path, "a")), tmp_path / "in" / "day=1" / "a")
    with pytest.raises(Exception, match="would both be written to"):
        run(settings(data__input=str(tmp_path / "in" / "day=1" / "a*")))


def test_a_limited_run_reads_its_rows(settings: Settings, write_source: Write) -> None:
    write_source("a.parquet", {"text": TEXTS})
    run(settings(data__limit=2))
    summary = run(settings(data__limit=2))
    assert (summary.unchanged_sources, summary.rows) == (0, 2)


def overwrite(path: Path, text: str) -> None:
    """Write a row of another text, as many bytes, and put the modification time back."""
    before = path.stat()
    pq.write_table(pa.table({"text": [text]}), path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_clock_that_jumped_hides_no_change(
    settings: Callable[..., dict[str, Any]],
    write_source: Write,
    digested: list[str],
    monkeypatch: pytest.MonkeyPatch,
    jump: int,
    out: Path,
) -> None:
    clock = time.time_ns
    monkeypatch.setattr(files, "TICK_NS", 10**6)
    a, b = (write_source(f"{name}.parquet", {"text": [name]}) for name in ("a", "b"))
    time.sleep(0.01)
    run(settings())
    monkeypatch.setattr(time, "time_ns", lambda: clock() + jump * 10**9)
    digested.clear()
    assert run(settings()).unchanged_sources == 2
    assert digested == []  # a stamp that was recorded needs no clock
    overwrite(a, "z")
    assert run(settings()).unchanged_sources == 1
    assert digested == ["a.parquet"]
    monkeypatch.setattr(time, "time_ns", clock)
    overwrite(a, "y")
    overwrite(b, "x")
    assert run(settings()).unchanged_sources == 0
    assert sorted(row["text"] for row in rows_of(out)) == ["x", "y"]


def test_files_from_the_future_are_digested_each_night(
    settings: Callable[..., dict[str, Any]],
    write_source: Write,
    digested: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = time.time_ns
    write_source("a.parquet", {"text": ["one"]})
    # The clock was set back after the file was written, or another machine's clock is ahead.
    monkeypatch.setattr(time, "time_ns", lambda: clock() - 3600 * 10**9)
    for _ in range(2):
        run(settings())
    assert digested == ["a.parquet"] * 2
    monkeypatch.setattr(time, "time_ns", lambda: clock() + 3600 * 10**9)
    for _ in range(2):
        assert run(settings()).unchanged_sources == 1
    assert digested == ["a.parquet"] * 3


def test_a_source_that_is_put_back_is_not_read_for_another(
    settings: Callable[..., dict[str, Any]], write_source: Write, tmp_path: Path
) -> None:
    path = write_source("a.parquet", {"text": ["one"]})
    (fragment,) = plan_run(JobConfig.model_validate(settings())).plan.fragments
    aside = path.rename(tmp_path / "aside")
    write_source("a.parquet", {"text": ["two"]})
    with pytest.raises(UnusableFile, match="was changed while the run read it"):
        next(read_fragment(fragment))
    with pytest.raises(UnusableFile, match="was changed while the run read it"):
        digest_file(path, fragment.stamp)
    aside.replace(path)
    assert [batch["text"].to_pylist() for batch in read_fragment(fragment)] == [["one"]]


def test_the_file_that_was_opened_counts(
    settings: Settings, write_source: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_source("a.parquet", {"text": ["one"]})
    (fragment,) = plan_run(JobConfig.model_validate(settings())).plan.fragments
    refuse_change = parquet.refuse_change
    aside = path.rename(tmp_path / "aside")
    write_source("a.parquet", {"text": ["two"]})

    def put_back_first(*arguments: Any) -> None:
        aside.replace(path)
        refuse_change(*arguments)

    monkeypatch.setattr(parquet, "refuse_change", put_back_first)
    with pytest.raises(UnusableFile, match="was changed while the run read it"):
        next(read_fragment(fragment))


def test_other_bytes_with_the_same_time_are_not_read(
    settings: Settings, write_source: Write, tmp_path: Path
) -> None:
    path = write_source("a.parquet", {"text": ["one"]})
    (fragment,) = plan_run(JobConfig.model_validate(settings())).plan.fragments
    other = Path(shutil.copy2(path, tmp_path / "other"))
    overwrite(other, "two")
    other.replace(path)  # as `rsync -t` does
    assert path.stat().st_mtime_ns == fragment.stamp[1]
    with pytest.raises(UnusableFile, match="was changed while the run read it"):
        list(read_fragment(fragment))


def test_a_link_other_rights_or_a_copy_change_no_source(
    settings: Settings, write_source: Write, tmp_path: Path
) -> None:
    path = write_source("a.parquet", {"text": ["one"]})
    (fragment,) = plan_run(JobConfig.model_validate(settings())).plan.fragments
    for harmless in (
        lambda: os.link(path, tmp_path / "link"),
        lambda: path.chmod(0o600),
        lambda: Path(shutil.copy2(path, tmp_path / "copy")).replace(path),
    ):
        harmless()
        assert version_stamp(path) != fragment.stamp
        assert [batch["text"].to_pylist() for batch in read_fragment(fragment)] == [["one"]]


def test_a_source_linked_while_it_is_planned_is_looked_at_again(
    settings: Settings, write_source: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_source("a.parquet", {"text": ["one"]})
    look_at, links = opening.look_at, count()

    def linked(looked: Path) -> Any:
        look = look_at(looked)
        if next(links) == 0:
            os.link(path, tmp_path / "link")
        return look

    monkeypatch.setattr(opening, "look_at", linked)
    (fragment,) = plan_run(JobConfig.model_validate(settings())).plan.fragments
    assert fragment.stamp == version_stamp(path)
