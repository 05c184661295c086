"""Rows that were answered before never reach the model again, wherever they stand tonight."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from glmbatch.glm.engine.protocol import ClassifyResult
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.ledger.known import Hold, KnownAnswers
from glmbatch.ledger.verification import verify
from glmbatch.report.summary import Summary
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.conftest import CAUSAL, CLASSIFY

Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
ROWS = 40
FAILED = 10  # two of each fragment of 8


def run(settings: dict[str, Any]) -> Summary:
    return run_job(JobConfig.model_validate(settings))


def computed(settings: dict[str, Any]) -> list[int]:
    return [step.computed for step in run(settings).steps]


def texts(first: int = 0, rows: int = ROWS) -> list[str]:
    return [f"text number {number} of the night" for number in range(first, first + rows)]


def answers(tmp_path: Path, out: str = "out") -> dict[str, tuple[Any, ...]]:
    """Label, scores and reply by text."""
    rows = ds.dataset(tmp_path / out, partitioning=None).to_table().to_pylist()
    return {
        row["text"]: (row["mood"], row["mood_scores"], row["reply"], row["reply_key"])
        for row in rows
    }


@pytest.fixture
def published(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> dict[str, tuple[Any, ...]]:
    """The answers after a first night over one file."""
    write_source("a.parquet", {"text": texts()})
    assert computed(job_settings()) == [ROWS, ROWS]
    return answers(tmp_path)


def test_one_new_row_is_one_row_through_the_model(
    published: dict[str, Any], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": [*texts()[:17], "a new row", *texts()[17:]]})
    summary = run(job_settings())
    assert [(step.computed, step.reused) for step in summary.steps] == [(1, ROWS), (1, ROWS)]
    after = answers(tmp_path)
    assert after.pop("a new row")[0] is not None
    assert after == published


@pytest.mark.parametrize(
    "change", ["renamed", "reversed", "split", "rewritten", "other fragments", "another column"]
)
def test_the_same_rows_in_other_files_cost_nothing(
    change: str,
    published: dict[str, Any],
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
) -> None:
    source = tmp_path / "in" / "a.parquet"
    settings = job_settings()
    if change == "renamed":
        source.rename(source.with_name("b.parquet"))
    elif change == "reversed":
        write_source("a.parquet", {"text": texts()[::-1]})
    elif change == "split":
        source.unlink()
        write_source("b.parquet", {"text": texts(0, 11)})
        write_source("day=2/c.parquet", {"text": texts(11, ROWS - 11)})
    elif change == "rewritten":
        write_source("a.parquet", {"text": texts()}, compression="gzip", row_group_size=3)
    elif change == "other fragments":
        settings = job_settings(data__rows_per_fragment=13)
    else:
        write_source("a.parquet", {"text": texts(), "new": list(range(ROWS))})
    settings["data"]["missing_sources"] = "drop"
    assert computed(settings) == [0, 0]
    assert answers(tmp_path) == published
    assert len(ds.dataset(tmp_path / "out", partitioning=None).to_table()) == ROWS
    assert verify(tmp_path / "out").findings == ()


def test_rows_of_a_file_that_is_gone_stay_unless_the_job_says_otherwise(
    published: dict[str, Any], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "in" / "a.parquet").unlink()
    write_source("b.parquet", {"text": texts(0, 11)})
    assert run(job_settings()).kept_sources == 1
    assert len(ds.dataset(tmp_path / "out", partitioning=None).to_table()) == ROWS + 11
    assert run(job_settings(data__missing_sources="drop")).kept_sources == 0
    assert len(ds.dataset(tmp_path / "out", partitioning=None).to_table()) == 11


def test_a_step_under_another_name_reuses_its_answers(
    published: dict[str, Any], job_settings: Settings, tmp_path: Path
) -> None:
    settings = job_settings()
    settings["steps"][0]["name"] = "tone"
    settings["steps"][1]["prompt_template"] = "{tone}: {text}"
    assert run(settings).steps[0].computed == 0
    rows = ds.dataset(tmp_path / "out", partitioning=None).to_table().to_pylist()
    assert {row["text"]: row["tone_scores"] for row in rows} == {
        text: row[1] for text, row in published.items()
    }


def test_the_published_rows_alone_suffice(
    published: dict[str, Any], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "out" / "_glmbatch")
    write_source("a.parquet", {"text": texts()[::-1]})
    assert computed(job_settings()) == [0, 0]
    assert answers(tmp_path) == published


def test_answers_in_a_changed_file_are_not_trusted(
    published: dict[str, Any], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "out" / "_glmbatch")
    first, *_ = sorted((tmp_path / "out").glob("a-*.parquet"))
    table = pq.read_table(first)
    lies = pa.array(["bad"] * len(table))
    pq.write_table(table.set_column(table.schema.get_field_index("mood"), "mood", lies), first)
    write_source("a.parquet", {"text": texts()[::-1]})
    assert computed(job_settings()) == [8, 8]
    assert answers(tmp_path) == published


@pytest.mark.parametrize("changed", ["weights", "labels", "dtype"])
def test_anything_that_changes_answers_asks_again(
    changed: str, published: dict[str, Any], job_settings: Settings, tmp_path: Path
) -> None:
    settings = job_settings()
    if changed == "weights":
        shutil.copytree(CAUSAL, tmp_path / "model")
        shard = sorted((tmp_path / "model").glob("*.bin"))[0]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        settings["model"] = {"path": str(tmp_path / "model")}
    elif changed == "labels":
        settings["steps"][0]["labels"] = ["good", "bad"]
    else:
        settings["model"]["dtype"] = "bfloat16"
    assert computed(settings)[0] == ROWS


def test_texts_that_repeat_across_fragments_and_files_are_asked_once(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    for name in "abc":
        write_source(f"{name}.parquet", {"text": texts(0, 20) * 2})
    assert computed(job_settings()) == [20, 20]
    assert len(ds.dataset(tmp_path / "out", partitioning=None).to_table()) == 120


def test_answers_of_a_run_that_never_published_are_reused(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": [*texts(), None, None, None]})
    with pytest.raises(Exception, match="nothing published"):
        run(job_settings(max_error_rate=0.01))
    write_source("a.parquet", {"text": texts()[::-1]})
    assert computed(job_settings(max_error_rate=0.01)) == [0, 0]


class Failing:
    """The engine of a machine that gives no finite scores for some prompts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = True
        plain = TorchEngine.classify

        def classify(engine: TorchEngine, requests: Any) -> Any:
            for result in plain(engine, requests):
                bad = self.fails and result.index % 5 == 0
                yield ClassifyResult(result.index, (), "not finite") if bad else result

        monkeypatch.setattr(TorchEngine, "classify", classify)


def test_only_rows_that_failed_are_tried_again(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Failing(monkeypatch)
    write_source("a.parquet", {"text": texts()})
    settings = job_settings(max_error_rate=0.5)
    settings["steps"] = settings["steps"][:1]
    first = run(settings)
    assert first.faulty_rows == FAILED
    engine.fails = False
    again = run(settings)
    assert (again.computed, again.faulty_rows) == (FAILED, 0)
    write_source("a.parquet", {"text": texts()[::-1]})
    assert computed(settings) == [0]


def test_a_step_that_had_to_do_without_an_earlier_answer_is_asked_once_that_is_there(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Failing(monkeypatch)
    write_source("a.parquet", {"text": [*texts(), None]})
    first = run(job_settings(max_error_rate=0.5))
    assert first.steps[1].faults == {"earlier_step_failed": FAILED + 1}
    engine.fails = False
    again = run(job_settings(max_error_rate=0.5))
    assert [step.computed for step in again.steps] == [FAILED, FAILED]
    assert again.steps[1].faults == {"earlier_step_failed": 1}
    assert computed(job_settings(max_error_rate=0.5)) == [0, 0]


def test_what_another_fragment_failed_to_answer_is_asked_by_who_waited(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other fragment holds every key and commits nothing: as if it had failed."""
    write_source("a.parquet", {"text": texts(0, 8)})
    monkeypatch.setattr(KnownAnswers, "hold", _held_by_another)
    assert computed(job_settings()) == [8, 8]


def _held_by_another(known: KnownAnswers, keys: Any) -> Any:
    return nullcontext(Hold(frozenset(), (), threading.Event()))


def test_a_killed_publication_costs_no_inference_of_the_night_after(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = job_settings(steps=[CLASSIFY], data__rows_per_fragment=100)
    write_source("a.parquet", {"text": texts()})
    run(settings)
    write_source("a.parquet", {"text": [*texts(), "one more"]})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.ledger.publication._write_list", killed)
        run(settings)
    write_source("a.parquet", {"text": [*texts(), "one more", "and one"]})
    assert computed(settings) == [1]
