"""A whole training: from labelled rows to a report and a checkpoint that a job uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.doctor import examine
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from glmbatch.tuning.encode import with_prompt
from glmbatch.tuning.finetune import check, finetune
from glmbatch.tuning.render import describe
from glmbatch.tuning.report import TRAINER
from tests.support import Tune, Write
from tests.unit.tuning.rows import GOOD

WRITES = {
    "data__response_column": "label",
    "training__max_answer_tokens": 8,
    "training__epochs": 6,
}


def job_over(tmp_path: Path, name: str, **step: Any) -> dict[str, Any]:
    """Settings of a job that answers the rows in `name` with the promoted checkpoint."""
    return {
        "data": {"input": str(tmp_path / name), "output": str(tmp_path / "out")},
        "model": str(tmp_path / "tuned" / "current" / "checkpoint"),
        "steps": [{"kind": "classify", "name": "mood", **step}],
    }


@pytest.mark.slow
def test_a_classifier_learns_and_answers_a_job(
    good: Tune, tmp_path: Path, write_source: Write
) -> None:
    report = finetune(good(**GOOD))
    assert report.scores.accuracy > 0.9
    assert report.baseline.accuracy > 0.9
    assert report.promoted
    run = Path(report.checkpoint).parent
    assert not examine(run / "checkpoint").problems
    assert not (run / TRAINER).exists()
    write_source("tonight.parquet", {"text": ["it was awful 77", "room great 12"]})
    run_job(JobConfig.model_validate(job_over(tmp_path, "in/tonight.parquet")))
    answers = pq.read_table(tmp_path / "out" / "tonight-0000000000.parquet").column("mood")
    assert answers.to_pylist() == ["bad", "good"]


@pytest.mark.slow
def test_the_page_and_the_card_show_the_report(tune: Tune) -> None:
    report = finetune(tune(training__epochs=1))
    run = Path(report.checkpoint).parent
    page = (run / "report.html").read_text()
    assert "<svg" in page and "Confusion" in page and "://" not in page
    for label, guesses in report.scores.confusion.items():
        for guess, rows in guesses.items():
            shown = f"<td>{label}</td><td>{guess or 'none'}</td><td class=number>{rows}</td>"
            assert (shown in page) == (rows > 0 and guess != label), "examples of each confusion"
    card = (run / "checkpoint" / "README.md").read_text()
    assert all(digest in card for digest in report.audit.files.values())
    assert report.training["used"]["learning_rate"] == 4e-3
    for text in (page, card):
        assert report.baseline_name in text and report.run in text
        assert "AdamW, beta2 0.98, weight decay 0.05" in text and "0.004" in text
    assert "lost their end" not in describe(report) and "cut texts 0" in describe(report)
    # As an earlier version wrote it.
    old = {key: value for key, value in report.training.items() if "cut" not in key}
    assert "cut texts" not in describe(report.model_copy(update={"training": old}))


@pytest.mark.slow
def test_a_step_must_use_the_prompt_of_training(tune: Tune, tmp_path: Path) -> None:
    report = finetune(tune(training__epochs=1, prompt_template="Review: {text}"))
    other = {**job_over(tmp_path, "in", prompt_template="Text: {text}"), "model": report.checkpoint}
    with pytest.raises(InputError, match="was trained with the prompt_template"):
        run_job(JobConfig.model_validate(other))
    asked = {**other, "steps": [{**other["steps"][0], "prompt_template": "Review: {text}"}]}
    assert run_job(JobConfig.model_validate(asked)).rows == 240


@pytest.mark.slow
def test_the_default_prompt_asks_for_the_labels(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = finetune(tune(training__epochs=1, must_beat=[], prompt_template=None))
    question = "{text}\n\nIs this bad, good or so so?"
    asked = {"prompt_template": question, "system_prompt": None, "chat": True}
    run = Path(report.checkpoint).parent
    assert json.loads((run / "checkpoint" / "glmbatch.json").read_text()) == asked
    assert report.settings["prompt_template"] == question and report.settings["chat"]
    # A step that sets no prompt takes that of the training, and so scores as the training did.
    settings = job_over(tmp_path, "in")
    settings["model"] = report.checkpoint
    named = job_over(tmp_path, "in", prompt_template=question, chat=True)
    named["model"] = report.checkpoint
    assert run_job(JobConfig.model_validate(settings)).steps[0].computed == 240
    assert run_job(JobConfig.model_validate(named)).steps[0].computed == 0
    named["steps"][0]["chat"] = False
    with pytest.raises(InputError, match="was trained with the chat True"):
        run_job(JobConfig.model_validate(named))
    more = tune(training__epochs=1, prompt_template=None, model={"path": report.checkpoint})
    assert with_prompt(more, report.labels, several=False).prompt_template == question


@pytest.mark.slow
def test_a_model_learns_to_write_and_answers_a_job(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = finetune(tune(**WRITES))
    assert report.promoted and report.baseline is None
    assert report.scores.rouge_l > 0.6
    page = (Path(report.checkpoint).parent / "report.html").read_text()
    assert "ROUGE-L" in page and "Confusion" not in page
    # The command finds the column of the training, and scores as the training did.
    command = [
        "evaluate",
        report.checkpoint,
        str(tmp_path / "in"),
        "--keep",
        str(tmp_path / "kept"),
    ]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "text" and found["rows"] == 240 and found["rouge_l"] > 0.6
    settings = job_over(tmp_path, "in")
    settings["steps"] = [{"kind": "generate", "name": "answer", "max_tokens": 8}]
    settings["data"]["limit"] = 20
    assert run_job(JobConfig.model_validate(settings)).rows == 20
    assert finetune(tune(**WRITES)) == report


@pytest.mark.slow
@pytest.mark.parametrize("writes", [False, True], ids=["labels", "answers"])
def test_cut_texts_and_answers_are_reported(
    tune: Tune, writes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    answers = {"data__response_column": "label", "training__max_answer_tokens": 1}
    report = finetune(
        tune(
            training__epochs=1,
            training__max_input_tokens=30 if writes else 8,
            **(answers if writes else {}),
        )
    )
    learned = report.training["learned"]
    assert learned == report.audit.parts["train"] + report.audit.parts["valid"]
    assert report.training["cut_texts"] > learned / 2 or writes
    assert report.training["cut_answers"] == (learned if writes else 0)
    told = f"{report.training['cut_answers' if writes else 'cut_texts']} of {learned}"
    run = Path(report.checkpoint).parent
    page, card = (run / "report.html").read_text(), (run / "checkpoint" / "README.md").read_text()
    for text in (page, card, describe(report)):
        assert told in text and "lost their end" in text
    assert "are cut off" in caplog.text
    assert writes or "on the full texts" in report.baseline_name


def test_a_dry_run_trains_nothing(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune.json"
    file.write_text(tune(prompt_template=None, training__max_input_tokens=48).model_dump_json())
    assert main(["train", str(file), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "train 144, valid 48, test 48" in shown and "promoted by accuracy" in shown
    assert "Is this bad, good or so so?', in the chat format" in shown
    assert "27 steps in 3 epochs, learning rate 0.004" in shown
    assert "mixed texts" not in shown and "advice" not in shown
    assert main(["train", str(file), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["train", str(file), "--dry-run", "--set", "least_test_rows=100"]) == 0
    warned = "nothing can be promoted: 48 test rows, and 100 are needed (least_test_rows), so some "
    assert f"{warned}500 labelled rows" in capsys.readouterr().out
    assert plan["cut"][0] > 0 and plan["tokens"][2] == 48
    assert not (tmp_path / "tuned").exists()


def test_a_file_in_place_of_the_output_is_refused_early(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match=r"taken: is a file where a folder .* Set output"):
        check(tune(output=str(tmp_path / "taken")))


def test_a_missing_model_is_an_error(tune: Tune) -> None:
    with pytest.raises(InputError, match="no such"):
        finetune(tune(model={"path": "/nowhere"}))
