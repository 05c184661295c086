"""Heads that judge each label by itself, or predict a number, answer as transformers' own model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.load import load_model, read_checkpoint
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.ledger.verification import verify
from glmbatch.run.canary import freeze
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import CAUSAL, CLASSIFIER, GENERATE, Settings, Write, rows_of, run
from tests.unit.glm.checkpoints import edit_config, read_state

TEXTS = [f"The {thing} came {how}." for thing in ("box", "lamp") for how in ("late", "", "broken")]
HEAD = ("classifier_head.weight", "classifier_head.bias")


def make_head(folder: Path, rows: int, **config: Any) -> Path:
    """The classifier of the goldens with `rows` rows of its head, and another config."""
    shutil.copytree(CLASSIFIER, folder)
    state = read_state(folder)
    for key in HEAD:
        state[key] = state[key][:rows].clone()
    torch.save(state, folder / "pytorch_model.bin")
    labels = {str(row): f"topic {row}" for row in range(rows)}
    edit_config(folder, **{"id2label": labels, "label2id": None, "problem_type": None, **config})
    return folder


def logits_of(model: Path) -> list[list[float]]:
    """The logits of transformers' own forward for each text."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    logits = []
    for text in TEXTS:
        ids = torch.tensor(tokenizer.encode([text]))
        logits.append(loaded(input_ids=ids).logits[0].tolist())
    return logits


@pytest.fixture
def several(tmp_path: Path) -> Path:
    return make_head(tmp_path / "several", 3, problem_type="multi_label_classification")


@pytest.fixture
def number(tmp_path: Path) -> Path:
    return make_head(tmp_path / "number", 1)


@pytest.fixture
def source(write_source: Write) -> Path:
    return write_source("a.parquet", {"text": TEXTS})


TOPICS: dict[str, Any] = {"kind": "classify", "name": "topics", "multiple": True}
STARS: dict[str, Any] = {"kind": "classify", "name": "stars", "number": True}


@pytest.mark.usefixtures("source")
def test_a_head_judges_each_label_by_itself(
    job_settings: Settings, out: Path, tmp_path: Path, several: Path
) -> None:
    step = {**TOPICS, "threshold": {"topic 1": 0.9}}
    settings = job_settings(model__path=str(several), steps=[step])
    summary = run(settings)
    rows = rows_of(out)
    counted: dict[str, int] = {}
    for row, logits in zip(rows, logits_of(several), strict=True):
        scores = torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
        labels = {f"topic {place}": score for place, score in enumerate(scores)}
        assert row["topics_scores"] == pytest.approx(labels, abs=1e-5)
        bounds = {"topic 0": 0.5, "topic 1": 0.9, "topic 2": 0.5}
        assert row["topics"] == [name for name in labels if labels[name] >= bounds[name]]
        for label in row["topics"]:
            counted[label] = counted.get(label, 0) + 1
    assert summary.steps[0].labels == counted
    assert counted
    # Alone, each row has the same bits, and with labels in another order the same answers.
    turned = [f"topic {place}" for place in (2, 0, 1)]
    settings["data"] |= {"output": str(tmp_path / "alone"), "rows_per_fragment": 1}
    settings["steps"] = [{**step, "labels": turned}]
    run(settings)
    for row, alone in zip(rows, rows_of(tmp_path / "alone"), strict=True):
        assert alone["topics_scores"] == row["topics_scores"]
        assert alone["topics"] == [label for label in turned if label in row["topics"]]


@pytest.mark.usefixtures("source")
def test_a_head_predicts_a_number(
    job_settings: Settings, out: Path, tmp_path: Path, number: Path
) -> None:
    expected = [logits[0] for logits in logits_of(number)]
    middle = sorted(expected)[3]
    later = {**GENERATE, "prompt_template": "{stars}: {text}", "model": {"path": str(CAUSAL)}}
    later["when"] = f"stars >= {middle - 1e-4}"
    settings = job_settings(model__path=str(number), steps=[STARS, later])
    assert preview(JobConfig.model_validate(settings)).steps[0].to_run == 6
    summary = run(settings)
    rows = rows_of(out)
    assert [row["stars"] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert [row["reply"] is not None for row in rows] == [value >= middle for value in expected]
    assert (summary.steps[0].labels, summary.steps[1].not_asked) == ({}, 3)
    added = [name for name in rows[0] if name.startswith("stars")]
    assert added == ["stars", "stars_error", "stars_error_type", "stars_key"]
    assert verify(out).sound
    settings["canary"] = str(tmp_path / "canary.parquet")
    freeze(out, settings["canary"], 6)
    settings["data"] |= {"output": str(tmp_path / "alone"), "rows_per_fragment": 1}
    audits = run(settings).audits
    assert [(audit.step, audit.measured) for audit in audits] == [("stars", 0), ("reply", 0)]
    assert [row["stars"] for row in rows_of(tmp_path / "alone")] == [row["stars"] for row in rows]


def test_what_a_head_predicts_survives_saving(tmp_path: Path, several: Path) -> None:
    from glmbatch.glm.checkpoint.save import save_checkpoint

    saved = tmp_path / "saved"
    save_checkpoint(load_model(several), saved, tokenizer_model=several / "tokenizer.model")
    assert read_checkpoint(saved).predicts == "labels"


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("head", "step", "message"),
    [
        ("several", {}, "judges each label by itself. Set multiple: true."),
        ("several", {"number": True}, "Set multiple: true instead of number."),
        ("several", {"multiple": True, "verdicts": ["ja", "nein"]}, "Leave verdicts out."),
        (
            "several",
            {"multiple": True, "threshold": {"x": 0.3}},
            r"names \['x'\], which is no label",
        ),
        ("several", {"multiple": True, "labels": ["a", "b"]}, "Leave the step's labels out"),
        ("number", {}, "predicts a number. Set number: true."),
        ("number", {"multiple": True}, "Set number: true instead of multiple."),
        ("one", {"number": True}, "trained to choose one label. Leave number out"),
        ("one", {"multiple": True}, "trained to choose one label. Leave multiple out"),
        ("none", {"number": True}, "no trained head to predict a number. Set its model."),
        ("none", {"multiple": True}, "has no trained head. Set the step's labels."),
    ],
)
def test_a_step_that_wants_another_answer_is_refused(
    job_settings: Settings, request: Any, head: str, step: dict[str, Any], message: str
) -> None:
    others = {"one": CLASSIFIER, "none": CAUSAL}
    model = others.get(head) or request.getfixturevalue(head)
    steps = [{"kind": "classify", "name": "a", **step}]
    with pytest.raises(InputError, match=message):
        run(job_settings(model__path=str(model), steps=steps))
