"""When a run publishes or refuses, and that published files are complete and listed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import AuditError, BadRow, InputError
from glmbatch.ledger import publication
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.ledger.publication import REFUSED
from glmbatch.ledger.verification import verify
from glmbatch.report.summary import Summary
from glmbatch.run.job import run_job
from glmbatch.run.publish import publish
from glmbatch.settings.job import JobConfig
from tests.support import (
    CLASSIFY,
    Settings,
    Write,
    assert_manifest_lists_what_is_there,
    read_quarantine,
    rows_of,
    run,
)

pytestmark = pytest.mark.slow


def visible_files(out: Path) -> dict[str, bytes]:
    """Content of each file at the top level of the output, by name."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_the_manifest_lists_published_files_with_digests(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["x"] * 20})
    run(job_settings())
    assert_manifest_lists_what_is_there(out)
    assert not (out / "_glmbatch" / "staged").exists()


def test_raise_stops_at_a_bad_row_and_publishes_nothing(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["fine"] * 9 + [None]})
    with pytest.raises(BadRow, match=r"a\.parquet: row 9, step 'mood': text is null\..*on_error"):
        run(job_settings(on_error="raise"))
    assert not (out / MANIFEST).exists()
    assert not list(out.glob("*.parquet"))


def test_raise_also_refuses_bad_rows_of_earlier_runs(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["x", None]})
    run(job_settings(max_error_rate=0.5))
    with pytest.raises(BadRow, match=r"a\.parquet: row 1, step 'mood': text is null"):
        run(job_settings(on_error="raise", max_error_rate=0.5))


def test_null_publishes_a_bad_row_with_its_reason(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["fine", "fine too", None]})
    summary = run(job_settings(on_error=None, max_error_rate=0.5))
    assert (summary.faulty_rows, summary.quarantined) == (1, False)
    assert rows_of(out)[2]["mood_error"] == "text is null"


@pytest.mark.parametrize(
    ("bad", "rate", "message"),
    [
        (3, 0.2, r"3 of 10 rows failed \(30\.0%\)"),
        (10, 0.99, "all 10 rows failed, max_error_rate allows 99"),
    ],
)
def test_too_many_failed_rows_leave_the_output_unchanged(
    write_source: Write, job_settings: Settings, bad: int, rate: float, message: str, out: Path
) -> None:
    write_source("a.parquet", {"text": ["yesterday"] * 10})
    run(job_settings())
    before = visible_files(out)
    write_source("a.parquet", {"text": ["today"] * (10 - bad) + [None] * bad})
    with pytest.raises(AuditError, match=f"nothing published: {message}"):
        run(job_settings(max_error_rate=rate))
    assert visible_files(out) == before


def test_the_failed_rows_of_a_refused_run_are_listed(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["today"] * 7 + [None] * 3})
    with pytest.raises(AuditError) as refused:
        run(job_settings(max_error_rate=0.2))
    listed = out / REFUSED
    assert str(listed) in str(refused.value)
    table = pq.read_table(listed).filter(pc.field("step") == "mood")
    assert sorted(table.column("row").to_pylist()) == [7, 8, 9]
    assert set(table.column("error").to_pylist()) == {"text is null"}
    write_source("a.parquet", {"text": ["today"] * 10})
    run(job_settings())
    assert not listed.exists()


def test_unreadable_files_count_towards_the_error_rate(
    write_source: Write, job_settings: Settings
) -> None:
    for number in range(4):
        source = write_source(f"{number}.parquet", {"text": [f"text {number}"] * 5})
        if number:
            source.write_bytes(source.read_bytes()[:-5])
    with pytest.raises(AuditError, match=r"15 of (some )?20 rows failed.* in unreadable files"):
        run(job_settings(max_error_rate=0.5))
    assert run(job_settings(max_error_rate=0.8)).rows == 5


def test_broken_files_without_any_row_are_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("empty.parquet", {"text": pa.array([], pa.string())})
    (tmp_path / "in" / "broken.parquet").write_bytes(b"broken")
    with pytest.raises(AuditError, match=r"all 1 rows failed, max_error_rate .* unreadable"):
        run(job_settings(on_error="null", max_error_rate=0.99))


@pytest.mark.parametrize("texts", [[""], [None], ["", None, " "]])
def test_all_failed_rows_are_published_at_error_rate_1(
    write_source: Write, job_settings: Settings, out: Path, texts: list[str | None]
) -> None:
    write_source("a.parquet", {"text": pa.array(texts, pa.string())})
    with pytest.raises(AuditError, match=r"max_error_rate allows 10\.0%"):
        run(job_settings())
    assert run(job_settings(max_error_rate=1.0)).faulty_rows == len(texts)
    assert all(row["mood_error"] for row in rows_of(out))


def place_nothing(path: Path) -> None:
    path.touch()


def place_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def place_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")


def place_unwritten_blocks(path: Path) -> None:
    path.write_bytes(bytes(50))


def place_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "place",
    [place_nothing, place_dangling_link, place_pointer, place_unwritten_blocks, place_pipe],
)
def test_a_file_of_unknown_size_counts_as_the_mean(
    write_source: Write, job_settings: Settings, tmp_path: Path, place: Callable[[Path], None]
) -> None:
    for name in ("a", "b"):
        write_source(f"{name}.parquet", {"text": [f"text {name}"] * 4})
    for number in range(3):
        place(tmp_path / "in" / f"z{number}.parquet")
    with pytest.raises(AuditError, match=r"12 of some 20 rows failed \(60\.0%\)"):
        run(job_settings(max_error_rate=0.59))
    assert run(job_settings(max_error_rate=0.6)).rows == 8
    # A trial stops at its limit before it reaches the unreadable files.
    assert run(job_settings(data__limit=2, data__output=str(tmp_path / "trial"))).rows == 2
    with pytest.raises(AuditError, match=r"12 of (some )?20 rows failed"):
        run(job_settings(data__limit=9, data__output=str(tmp_path / "trial")))


def test_an_unreadable_file_counts_as_at_least_one_row(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("empty.parquet", {"text": pa.array([], pa.string())})
    write_source("a.parquet", {"text": ["x"]})
    write_source("b.parquet", {"text": pa.array([], pa.string())})
    (tmp_path / "in" / "z.parquet").touch()
    with pytest.raises(AuditError, match="1 of some 2 rows failed"):
        run(job_settings(max_error_rate=0.0))


def test_a_file_with_a_wrong_schema_counts_its_own_rows(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["a much longer text than the others have"] * 71})
    write_source("b.parquet", {"body": [1] * 29})
    with pytest.raises(AuditError, match="29 of 100 rows failed"):
        run(job_settings(max_error_rate=0.28))
    # In floating point, 0.29 * 100 is less than 29.
    assert run(job_settings(max_error_rate=0.29)).rows == 71


def test_refused_answers_are_never_published_later(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["x"] * 9 + [None]})
    fine = job_settings(max_error_rate=0.2)
    run(fine)
    before = rows_of(out)
    other = job_settings(max_error_rate=0.0)
    other["steps"][1]["max_tokens"] = 2
    with pytest.raises(AuditError):
        run(other)
    run(fine)
    assert rows_of(out) == before
    assert_manifest_lists_what_is_there(out)


def test_a_missing_canary_is_refused_before_any_work(
    write_source: Write, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    write_source("a.parquet", {"text": ["one"]})
    with pytest.raises(InputError, match="Set canary"):
        run(job_settings(canary=str(tmp_path / "none.parquet")))
    assert not list(out.rglob("*.parquet"))


@pytest.mark.parametrize("call", ["commit_all", "write_quarantine", "write_manifest"])
def test_a_publication_cut_off_leaves_what_it_overwrote(
    write_source: Write,
    job_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    call: str,
) -> None:
    """Killed in the middle, and then its source is gone: the manifest's rows are there again."""
    settings = job_settings(steps=[CLASSIFY], max_error_rate=0.5)
    write_source("b.parquet", {"text": ["b"]})
    source = write_source("a.parquet", {"text": [f"old {row}" for row in range(11)] + [None]})
    run(settings)
    before, listed = rows_of(out), read_quarantine(out)
    write_source("a.parquet", {"text": [None] + [f"new {row}" for row in range(11)]})
    commit_all = publication.commit_all

    def killed(*arguments: Any) -> None:
        if call == "commit_all":  # one of the two files
            commit_all(arguments[0][:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(publication, call, killed)
        run(settings)
    assert rows_of(out) != before
    source.unlink()
    assert run(settings).kept_sources == 1
    assert (rows_of(out), read_quarantine(out)) == (before, listed)
    assert verify(out).sound
    assert not list(out.glob("_glmbatch/overwritten/*"))


def test_readers_see_whole_files_during_publication(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    settings = job_settings(steps=[CLASSIFY])
    written: list[list[str]] = []
    read: list[list[str]] = []
    stop = threading.Event()

    def read_all() -> None:
        while not stop.is_set():
            for file in range(6):
                # Opened once: given a path, read_table opens the file twice, perhaps two files.
                with (out / f"{file}-0000000000.parquet").open("rb") as opened:
                    table = pq.read_table(opened)
                read.append(table.column("text").to_pylist())

    reader = threading.Thread(target=read_all)
    for night in range(3):
        for file in range(6):
            texts = [f"file {file} night {night} row {row}" for row in range(4)]
            write_source(f"{file}.parquet", {"text": texts})
            written.append(texts)
        run(settings)
        if night == 0:
            reader.start()
    stop.set()
    reader.join()
    assert all(texts in written for texts in read)
    assert len(read) > 6


def test_the_input_may_be_emptied_before_publication(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    source = write_source("a.parquet", {"text": ["one", None], "id": ["x", "y"]})

    def emptied(*arguments: Any) -> Summary:
        source.unlink()
        return publish(*arguments)

    monkeypatch.setattr("glmbatch.run.job.publish", emptied)
    summary = run(job_settings(steps=[CLASSIFY], data__id_column="id", max_error_rate=0.5))
    assert summary.samples[0]["text"] == "one"
    assert [line["id"] for line in read_quarantine(out)] == ["y"]


def test_one_process_cannot_run_twice_into_one_output(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["one"]})
    job = JobConfig.model_validate(job_settings(steps=[CLASSIFY]))
    Ledger(job.data.output).open("another")
    with pytest.raises(InputError, match="another run of this process"):
        run_job(job)
    Ledger(job.data.output).close("another")
    assert run_job(job).rows == 1
