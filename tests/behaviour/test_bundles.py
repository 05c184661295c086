"""Small fragments share tasks, and each keeps its own receipt, faults and reuse."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import InputError, UnusableFile
from glmbatch.glm.engine.protocol import ClassifyResult
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.ledger.committed import CommittedFiles
from glmbatch.ledger.fragments import Fragment, read_fragment
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.verification import verify
from glmbatch.report.summary import Summary
from glmbatch.run import ask as asking
from glmbatch.run import job, plan, prompts, write
from glmbatch.run.ask import ask
from glmbatch.run.plan import bundled
from glmbatch.steps.prompt import RowFault
from tests.support import (
    CLASSIFY,
    Settings,
    Write,
    committed,
    proved,
    rows_of,
    run,
    touch_published,
)

FILES = 12
# Of these texts, two are in all files.
TEXTS = [["the same everywhere", "often", f"only in file {number}"] for number in range(FILES)]


@pytest.fixture
def in_one_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BUNDLES", 1)


@pytest.fixture
def settings(job_settings: Settings) -> Settings:
    """Settings of a job whose bundles may have all rows."""

    def with_changes(**changes: Any) -> dict[str, Any]:
        return job_settings(data__rows_per_fragment=100, **changes)

    return with_changes


@pytest.fixture
def sources(write_source: Write) -> list[Path]:
    paths = []
    for number, texts in enumerate(TEXTS):
        paths.append(write_source(f"{number:02}.parquet", {"text": texts}))
    return paths


def of_rows(rows: int, first_row: int = 0) -> Fragment:
    return Fragment(
        source="a",
        path="a",
        digest="",
        stamp=(0, 0),
        first_row=first_row,
        rows=rows,
        row_groups=(),
        skip_rows=0,
    )


def sizes(rows: list[int], most_rows: int, bundles: int) -> list[list[int]]:
    fragments = [of_rows(size, first_row) for first_row, size in enumerate(rows)]
    parts = list(bundled(fragments, most_rows, bundles))
    assert [fragment for part in parts for fragment in part] == fragments
    return [[fragment.rows for fragment in part] for part in parts]


def test_fragments_are_bundled_only_if_there_are_many() -> None:
    assert sizes([3] * 64, 10_000, 64) == [[3]] * 64
    assert sizes([3] * 128, 10_000, 64) == [[3, 3]] * 64
    assert sizes([0] * 128, 10_000, 64) == [[0, 0]] * 64
    assert sizes([400] * 6, 1_000, 2) == [[400, 400]] * 3
    assert sizes([1_000, 3, 3, 900, 0, 3], 1_000, 1) == [[1_000], [3, 3, 900, 0, 3]]
    assert sizes([], 1_000, 64) == []


def counts(summary: Summary) -> list[tuple[int, ...]]:
    """The counts of each step."""
    steps = []
    for step in summary.steps:
        tokens = (step.prompt_tokens, step.completion_tokens)
        steps.append((step.answers, step.computed, step.reused, step.repeated, *tokens))
    return steps


def test_a_bundle_gives_the_rows_and_counts_of_fragments(
    sources: list[Path],
    write_source: Write,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(sources[0], sources[0].with_name("00-twin.parquet"))
    write_source("empty.parquet", {"text": ["", None, "often"]})
    write_source("without-rows.parquet", {"text": TEXTS[0][:0]}, row_group_size=1)
    alone = run(settings(data__output=str(tmp_path / "alone")))
    monkeypatch.setattr(plan, "BUNDLES", 3)
    together = run(settings(data__output=str(tmp_path / "together")))
    assert len(committed(tmp_path / "alone")) == 2 * (len(sources) + 2)  # twins share theirs
    assert len(committed(tmp_path / "together")) <= 2 * 4
    assert counts(together) == counts(alone)
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")
    assert verify(str(tmp_path / "together")).sound
    by_file = [
        [(answers.rows, answers.faults, answers.labels) for answers in receipt.answers]
        for receipt in receipts(tmp_path / "together")
    ]
    assert by_file == [
        [(answers.rows, answers.faults, answers.labels) for answers in receipt.answers]
        for receipt in receipts(tmp_path / "alone")
    ]
    assert receipts(tmp_path / "alone")


def receipts(output: Path) -> list[Any]:
    ledger = Ledger(output)
    manifest = ledger.manifest()
    assert manifest is not None
    found = [ledger.outputs.published(file.output_name, file.digest) for file in manifest.files]
    assert None not in found
    return found


@pytest.mark.usefixtures("in_one_bundle")
def test_a_damaged_file_of_a_bundle_is_left_out_alone(
    sources: list[Path], settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as damaged:
        unreadable(damaged, sources[3].name)
        first = run(settings(max_error_rate=0.5))
    assert [(fault.source, fault.reason) for fault in first.unusable] == [
        (sources[3].name, f"{sources[3].name} is damaged")
    ]
    assert len(rows_of(out)) == 3 * (FILES - 1)
    second = run(settings(max_error_rate=0.5))
    assert [step.computed for step in second.steps] == [1, 1], "its own text alone"
    assert len(rows_of(out)) == 3 * FILES


@pytest.mark.usefixtures("in_one_bundle")
@pytest.mark.parametrize("loss", ["deleted", "damaged"])
def test_a_lost_output_is_made_again_without_the_model(
    sources: list[Path], settings: Settings, out: Path, loss: str
) -> None:
    run(settings())
    before = rows_of(out)
    for number in (2, 5):
        path = out / f"{number:02}-0000000000.parquet"
        if loss == "deleted":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-7] + b"no more")
    summary = run(settings())
    assert [step.computed for step in summary.steps] == [0, 0]
    assert rows_of(out) == before
    assert verify(str(out)).sound


@pytest.mark.usefixtures("in_one_bundle")
@pytest.mark.parametrize("change", ["nothing", "a new file"])
def test_answers_of_a_stopped_run_are_not_asked_again(
    sources: list[Path],
    write_source: Write,
    settings: Settings,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(job, "write_outputs", stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings())
    if change == "a new file":
        write_source("00a.parquet", {"text": ["new", "often"]})
    summary = run(settings())
    new = 1 if change == "a new file" else 0
    assert [step.computed for step in summary.steps] == [new, new]
    assert summary.rows == 3 * FILES + 2 * new


@pytest.mark.usefixtures("in_one_bundle")
def test_an_output_with_the_same_answers_is_not_written_again(
    sources: list[Path], settings: Settings, out: Path
) -> None:
    run(settings())
    before = Ledger(out).manifest()
    touch_published(out)
    run(settings())
    after = Ledger(out).manifest()
    assert before is not None
    assert after is not None
    assert proved(after) == proved(before)


@pytest.mark.usefixtures("in_one_bundle", "sources")
def test_a_bad_row_of_a_bundle_is_named_by_file_and_number(
    write_source: Write, settings: Settings
) -> None:
    path = write_source("05.parquet", {"text": ["fine", " ", "fine"]})
    with pytest.raises(InputError, match=rf"{path}: row 1, step 'mood': text is empty"):
        run(settings(on_error="raise"))


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let no row of the source `name` be read."""

    def read(fragment: Fragment, columns: Any = None, **options: Any) -> Any:
        if fragment.source == name:
            raise UnusableFile(f"{name} is damaged")
        return read_fragment(fragment, columns, **options)

    for module in (prompts, write):
        monkeypatch.setattr(module, "read_fragment", read)


@pytest.mark.usefixtures("in_one_bundle")
@pytest.mark.parametrize("damaged", ["a.parquet", "b.parquet"])
def test_a_copy_of_a_file_that_cannot_be_read_is_answered(
    write_source: Write,
    settings: Settings,
    damaged: str,
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
) -> None:
    write_source("a.parquet", {"text": ["one", "two"]})
    write_source("b.parquet", {"text": ["one", "two"]})
    unreadable(monkeypatch, damaged)
    summary = run(settings(max_error_rate=0.9))
    assert [(fault.source, fault.reason) for fault in summary.unusable] == [
        (damaged, f"{damaged} is damaged")
    ]
    assert [row["text"] for row in rows_of(out)] == ["one", "two"]


@pytest.mark.usefixtures("in_one_bundle")
def test_two_bundles_of_the_same_rows_lose_only_damage(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    for day in ("x", "y"):
        write_source(f"{day}1.parquet", {"text": ["one", "two"]})
        write_source(f"{day}2.parquet", {"text": ["three", "four"]})
    unreadable(monkeypatch, "x1.parquet")
    summary = run(job_settings(data__rows_per_fragment=4, max_error_rate=0.9))
    assert [fault.source for fault in summary.unusable] == ["x1.parquet"]
    assert len(rows_of(out)) == 6
    assert verify(str(out)).sound


def test_a_stale_receipt_does_not_decide_what_is_published(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    write_source("a.parquet", {"text": ["one", "two", "three"]})
    settled = job_settings(steps=[CLASSIFY], max_error_rate=1)
    with monkeypatch.context() as failing:
        failing.setattr(asking, "ask", with_a_failure)
        run(settled)
    (stale,) = receipts(out)
    assert stale.faulty_rows == 1

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(job, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(settled)  # asks about the failed row, and stages the file
    with monkeypatch.context() as cached:
        cached.setattr(job, "write_outputs", lambda *_: [stale])
        assert run(settled).faulty_rows == 0
    assert [row["mood_error"] for row in rows_of(out)] == [None, None, None]


def with_a_failure(*arguments: Any, **options: Any) -> Any:
    """What the model answers, but for the first prompt."""
    (asked,) = ask(*arguments, **options)
    asked.outcomes[next(iter(asked.outcomes))] = RowFault("model_failed", "out of memory")
    return [asked]


@pytest.mark.usefixtures("in_one_bundle")
def test_a_killed_retry_of_failed_rows_is_not_repeated(
    sources: list[Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    failing = {0, 1}
    plain = TorchEngine.classify

    def classify(engine: TorchEngine, requests: Any) -> Any:
        for result in plain(engine, requests):
            bad = result.index in failing
            yield ClassifyResult(result.index, (), "not finite") if bad else result

    monkeypatch.setattr(TorchEngine, "classify", classify)
    allowing = settings(max_error_rate=0.9, steps=[CLASSIFY])
    assert run(allowing).computed == FILES + 2
    failing.remove(0)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(job, "write_outputs", stop)
        run(allowing)
    failing.clear()
    assert run(allowing).computed == 1
    assert run(allowing).faulty_rows == 0


@pytest.mark.usefixtures("in_one_bundle", "sources")
def test_answers_files_are_not_opened_once_published(
    settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings())
    ledger = Ledger(out)
    manifest = ledger.manifest()
    assert manifest is not None
    monkeypatch.setattr(CommittedFiles, "receipt", None)
    for step_key in manifest.files[0].step_keys.values():
        assert all(file.is_published for file in ledger.answer_files(step_key))
