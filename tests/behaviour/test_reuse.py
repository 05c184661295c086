"""Rows that were answered before never reach the model again, wherever they have moved."""

from __future__ import annotations

import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.glm.engine.protocol import ClassifyResult
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.ledger.known.answers import Hold, KnownAnswers
from glmbatch.ledger.verification import verify
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import CAUSAL, CLASSIFY, Settings, Write, rows_of, run

ROWS = 40
FAILED = 10  # two in each fragment of 8 rows


def computed(settings: dict[str, Any]) -> list[int]:
    return [step.computed for step in run(settings).steps]


def texts(first: int = 0, rows: int = ROWS) -> list[str]:
    return [f"text number {number} of the night" for number in range(first, first + rows)]


def answers(out: Path) -> dict[str, tuple[Any, ...]]:
    """Label, scores, reply and its row key, by text."""
    columns = ("mood", "mood_scores", "reply", "reply_key")
    by_text = {}
    for row in rows_of(out):
        by_text[row["text"]] = tuple(row[name] for name in columns)
    return by_text


@pytest.fixture
def published(write_source: Write, job_settings: Settings, out: Path) -> dict[str, tuple[Any, ...]]:
    """The answers after a first night over one file."""
    write_source("a.parquet", {"text": texts()})
    assert computed(job_settings()) == [ROWS, ROWS]
    return answers(out)


def test_one_new_row_costs_one_inference(
    published: dict[str, Any], write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": [*texts()[:17], "a new row", *texts()[17:]]})
    summary = run(job_settings())
    assert [(step.computed, step.reused) for step in summary.steps] == [(1, ROWS), (1, ROWS)]
    after = answers(out)
    assert after.pop("a new row")[0] is not None
    assert after == published


@pytest.mark.parametrize(
    "change", ["renamed", "reversed", "split", "rewritten", "other fragments", "another column"]
)
def test_moving_rows_between_files_costs_nothing(
    change: str,
    published: dict[str, Any],
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
    out: Path,
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
    assert answers(out) == published
    assert len(rows_of(out)) == ROWS
    assert verify(out).findings == ()


def test_rows_of_a_missing_file_stay_unless_dropped(
    published: dict[str, Any],
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
    out: Path,
) -> None:
    (tmp_path / "in" / "a.parquet").unlink()
    write_source("b.parquet", {"text": texts(0, 11)})
    assert run(job_settings()).kept_sources == 1
    assert len(rows_of(out)) == ROWS + 11
    assert run(job_settings(data__missing_sources="drop")).kept_sources == 0
    assert len(rows_of(out)) == 11


def test_a_renamed_step_reuses_its_answers(
    published: dict[str, Any], job_settings: Settings, out: Path
) -> None:
    settings = job_settings()
    settings["steps"][0]["name"] = "tone"
    settings["steps"][1]["prompt_template"] = "{tone}: {text}"
    assert run(settings).steps[0].computed == 0
    scores = {row["text"]: row["tone_scores"] for row in rows_of(out)}
    assert scores == {text: answer[1] for text, answer in published.items()}


def test_one_question_under_two_names_is_asked_once(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": texts()})
    step = {"kind": "generate", "prompt_template": "{text}", "max_tokens": 2}
    settings = job_settings(steps=[{**step, "name": "a"}, {**step, "name": "b"}])
    plan = preview(JobConfig.model_validate(settings)).steps
    assert [(step.step, step.to_run) for step in plan] == [("a", ROWS), ("b", 0)]
    assert sorted(computed(settings)) == [0, ROWS]
    assert all(row["a"] == row["b"] and row["a_key"] == row["b_key"] for row in rows_of(out))


def test_published_rows_alone_suffice_for_reuse(
    published: dict[str, Any], write_source: Write, job_settings: Settings, out: Path
) -> None:
    shutil.rmtree(out / "_glmbatch")
    write_source("a.parquet", {"text": texts()[::-1]})
    assert computed(job_settings()) == [0, 0]
    assert answers(out) == published


def test_answers_in_a_changed_file_are_not_trusted(
    published: dict[str, Any], write_source: Write, job_settings: Settings, out: Path
) -> None:
    shutil.rmtree(out / "_glmbatch")
    first, *_ = sorted(out.glob("a-*.parquet"))
    table = pq.read_table(first)
    lies = pa.array(["bad"] * len(table))
    pq.write_table(table.set_column(table.schema.get_field_index("mood"), "mood", lies), first)
    write_source("a.parquet", {"text": texts()[::-1]})
    assert computed(job_settings()) == [8, 8]
    assert answers(out) == published


@pytest.mark.parametrize("changed", ["weights", "labels", "dtype"])
def test_changes_that_affect_answers_ask_again(
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


def test_texts_repeated_across_files_are_asked_once(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    for name in "abc":
        write_source(f"{name}.parquet", {"text": texts(0, 20) * 2})
    assert computed(job_settings()) == [20, 20]
    assert len(rows_of(out)) == 120


def test_answers_of_an_unpublished_run_are_reused(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": [*texts(), None, None, None]})
    with pytest.raises(Exception, match="nothing published"):
        run(job_settings(max_error_rate=0.01))
    write_source("a.parquet", {"text": texts()[::-1]})
    assert computed(job_settings(max_error_rate=0.01)) == [0, 0]


class Failing:
    """Makes the engine return no finite scores for every fifth request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = True
        plain = TorchEngine.classify

        def classify(engine: TorchEngine, requests: Any) -> Any:
            for result in plain(engine, requests):
                bad = self.fails and result.index % 5 == 0
                yield ClassifyResult(result.index, (), "not finite") if bad else result

        monkeypatch.setattr(TorchEngine, "classify", classify)


def test_only_failed_rows_are_retried(
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


def test_a_step_runs_once_the_answer_it_needs_exists(
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


def test_a_fragment_asks_what_another_failed_to_answer(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another fragment holds every key but commits nothing, as if it had failed."""
    write_source("a.parquet", {"text": texts(0, 8)})
    monkeypatch.setattr(KnownAnswers, "hold", _held_by_another)
    assert computed(job_settings()) == [8, 8]


def _held_by_another(known: KnownAnswers, keys: Any) -> Any:
    return nullcontext(Hold(frozenset(), (), threading.Event()))


def test_a_killed_publication_repeats_no_inference(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = job_settings(steps=[CLASSIFY], data__rows_per_fragment=100)
    write_source("a.parquet", {"text": texts()})
    run(settings)
    write_source("a.parquet", {"text": [*texts(), "one more"]})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.ledger.publication.write_quarantine", killed)
        run(settings)
    write_source("a.parquet", {"text": [*texts(), "one more", "and one"]})
    assert computed(settings) == [1]
