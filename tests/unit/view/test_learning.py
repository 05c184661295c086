"""Corrections of every kind of step are what `evaluate` and `train` take, as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.evaluation.evaluate import evaluate
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.examples import read_examples
from glmbatch.tuning.finetune import finetune
from glmbatch.view.viewer import Viewer
from tests.support import SAMPLE_MODEL, column_of, run
from tests.unit.tuning.rows import labelled
from tests.unit.view.conftest import STEPS, job

pytestmark = pytest.mark.slow
FACTS = '{"tone": "calm", "what": "a review"}'


@pytest.fixture
def corrections(folder: Path) -> Path:
    """Truths of every kind: some that the model answered, and others."""
    viewer = Viewer(str(folder / "out"))
    version = viewer.output()["version"]
    for number in range(8):
        steps = viewer.row(version, 0, number)["steps"]
        right = {step["name"]: step["answer"] for step in steps}
        if number % 2:
            other = next(label for label in ("good", "bad") if label != right["mood"])
            right = {"mood": other, "topics": ["size"], "facts": FACTS, "reply": "Thank you."}
        for step in steps:
            if right[step["name"]] is not None and (step["name"] != "facts" or number != 6):
                viewer.correct(version, 0, number, step["name"], right[step["name"]])
    viewer.close()
    return folder / "out-corrections"


def training(corrections: Path, tmp_path: Path, **data: str) -> TuneConfig:
    columns = {"input": str(corrections), "text_column": "body", **data}
    settings = {"data": columns, "output": str(tmp_path / "tuned"), "model": str(SAMPLE_MODEL)}
    return TuneConfig.model_validate(settings)


def test_evaluate_takes_corrections_of_every_kind(
    folder: Path, corrections: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job(folder)), encoding="utf-8")
    assert main(["evaluate", str(file), str(corrections), "--json"]) == 0
    found = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    truths = pq.read_table(corrections).to_pylist()
    mood, topics, facts, reply = (found[name] for name in ("mood", "topics", "facts", "reply"))
    assert mood["results"]["mood"]["accuracy"] == 0.5
    assert mood["counts"]["scored"] == topics["counts"]["scored"] == 8
    assert facts["counts"]["without_truth"] == sum(row["facts"] is None for row in truths)
    assert reply["results"]["reply"]["exact_match"] == pytest.approx(0.5)
    assert {*facts["results"]} == {"tone", "what"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"label_column": "mood"}, lambda row: row["mood"]),
        ({"label_column": "topics"}, lambda row: sorted(row["topics"])),
        ({"response_column": "reply"}, lambda row: row["reply"]),
        ({"response_column": "facts"}, lambda row: row["facts"]),
    ],
)
def test_train_reads_corrections_of_every_kind(
    corrections: Path, tmp_path: Path, data: dict[str, str], expected: Any
) -> None:
    (column,) = data.values()
    rows = pq.read_table(corrections).to_pylist()
    wanted = {row["body"]: expected(row) for row in rows if row[column] is not None}
    read = {}
    for example in read_examples(training(corrections, tmp_path, **data).data).examples:
        read[example.text] = (
            sorted(example.several) if example.several is not None else example.label
        )
    assert read == {text: truth for text, truth in wanted.items() if truth != ""}


@pytest.mark.parametrize(
    ("column", "truth", "written", "learned"),
    [("reply", "good", "reply", "good"), ("facts", FACTS, "facts_what", "a review")],
)
def test_a_writer_trained_with_corrections_answers_the_step(
    tmp_path: Path, column: str, truth: str, written: str, learned: str
) -> None:
    """Texts and typed fields, from published answers to the job that uses what was learned."""
    (tmp_path / "in").mkdir()
    texts = labelled(32, seed=2)["text"]
    pq.write_table(pa.table({"body": texts}), tmp_path / "in" / "a.parquet")
    (step,) = (step for step in STEPS if step["name"] == column)
    step = {**step, "prompt_template": "{text}", "max_tokens": 20}
    settings = {**job(tmp_path), "model": str(SAMPLE_MODEL), "steps": [step]}
    run(settings)
    viewer = Viewer(str(tmp_path / "out"))
    version = viewer.output()["version"]
    for place in range(32):
        viewer.correct(version, place // 8, place % 8, column, truth)
    viewer.close()
    config = training(tmp_path / "out-corrections", tmp_path, response_column=column).model_dump()
    config |= {"must_beat": [], "least_test_rows": 1}
    own = {"method": "full", "epochs": 6, "batch_rows": 8, "learning_rate": 4e-3}
    own |= {"gradient_checkpointing": False, "max_answer_tokens": 30}
    report = finetune(TuneConfig.model_validate({**config, "training": own}))
    assert report.promoted
    places = {**settings["data"], "output": str(tmp_path / "learned")}
    run({**settings, "model": report.checkpoint, "data": places})
    assert column_of(tmp_path / "out", written).count(learned) < 16
    assert column_of(tmp_path / "learned", written).count(learned) > 25


def test_evaluate_names_what_the_corrections_lack(folder: Path, corrections: Path) -> None:
    changed = job(folder)
    changed["steps"] = [{**changed["steps"][0], "prompt_template": "{headline}: {body}"}]
    with pytest.raises(InputError, match="headline"):
        evaluate(changed, str(corrections), keep=folder / "kept")
