"""Which model answers a step: heads, adapters, several models, changed and unsuitable models."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import InputError
from glmbatch.glm import device
from glmbatch.run.answer import answer
from glmbatch.run.models import locate_model, prepare_model, prepare_models
from glmbatch.run.plan import assign, plan_run, resolve_questions
from glmbatch.run.prompts import inputs_of
from glmbatch.run.session import session
from glmbatch.run.work import plan_passes
from glmbatch.settings.job import JobConfig, ModelConfig
from tests.support import (
    CAUSAL,
    CLASSIFIER,
    CLASSIFY,
    GENERATE,
    Settings,
    Write,
    column_of,
    rows_of,
    run,
)
from tests.unit.glm.adapters import make_original_adapter
from tests.unit.glm.checkpoints import read_json

pytestmark = pytest.mark.slow


def write_adapter(tmp_path: Path, name: str, seed: int = 0) -> ModelConfig:
    make_original_adapter(tmp_path / name, read_json(CAUSAL / "config.json"), seed=seed)
    return ModelConfig(path=str(CAUSAL), adapter=str(tmp_path / name))


def test_a_trained_head_uses_its_own_labels(
    rows: list[str],
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source("a.parquet", {"text": rows})
    settings = job_settings()
    settings["steps"][0] = {"kind": "classify", "name": "mood", "model": {"path": str(CLASSIFIER)}}
    run(settings)
    together = rows_of(out)
    labels = ["负面", "中性", "正面"]
    assert {row["mood"] for row in together} <= set(labels)
    assert list(together[0]["mood_scores"]) == labels
    settings["data"]["output"] = str(tmp_path / "one-by-one")
    monkeypatch.setattr(device, "free_memory_bytes", lambda name: 0)  # forces one model at a time
    run(settings)
    assert rows_of(tmp_path / "one-by-one") == together


def test_each_step_gets_its_own_adapter_over_one_base(
    rows: list[str], write_source: Write, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    models = {
        "bare": ModelConfig(path=str(CAUSAL)),
        "a": write_adapter(tmp_path, "a", seed=1),
        "b": write_adapter(tmp_path, "b", seed=2),
    }
    steps = {
        name: {**CLASSIFY, "name": name, "model": model.model_dump()}
        for name, model in models.items()
    }
    run(job_settings(steps=list(steps.values())))
    for row in rows_of(out):
        assert len({str(row[f"{name}_scores"]) for name in models}) == 3
    for name, step in steps.items():
        alone = tmp_path / f"out-{name}"
        run(job_settings(steps=[step], data__output=str(alone)))
        assert column_of(alone, f"{name}_key") == column_of(out, f"{name}_key")
        assert column_of(alone, f"{name}_scores") == column_of(out, f"{name}_scores")


def test_changing_an_adapter_changes_the_model_identity(
    job_settings: Settings, tmp_path: Path
) -> None:
    job = JobConfig.model_validate(job_settings())
    model = write_adapter(tmp_path, "adapter")
    bare = prepare_model(locate_model(job.model, job.runtime))
    before = prepare_model(locate_model(model, job.runtime))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = prepare_model(locate_model(model, job.runtime))
    assert len({bare.identity, before.identity, after.identity}) == 3
    assert prepare_model(locate_model(job.model, job.runtime)) == bare


def test_quantization_changes_the_model_identity(job_settings: Settings) -> None:
    job = JobConfig.model_validate(job_settings())
    int8 = job.model.model_copy(update={"quantization": "int8"})
    bare = prepare_model(locate_model(job.model, job.runtime))
    assert prepare_model(locate_model(int8, job.runtime)).identity != bare.identity


def test_models_too_large_to_load_together_take_turns(job_settings: Settings) -> None:
    other = {"path": str(CLASSIFIER)}
    settings = job_settings()
    settings["steps"] = [
        {**CLASSIFY, "name": "a"},
        {"kind": "classify", "name": "b", "model": other},
        {**GENERATE, "name": "c", "prompt_template": "{a} {text}"},
        {**GENERATE, "name": "d", "prompt_template": "{b} {text}"},
    ]
    job = JobConfig.model_validate(settings)
    questions = resolve_questions(job, inputs_of(job), prepare_models(job))
    assert plan_passes(questions, together=True) == ((0, 1, 2, 3),)
    assert plan_passes(questions, together=False) == ((0, 2), (1,), (3,))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"kind": "classify", "name": "a", "labels": None},
            r"has no trained head\. Set the step's labels\.",
        ),
        (
            {"kind": "classify", "name": "a", "model": str(CLASSIFIER), "labels": ["x", "y"]},
            "was trained for",
        ),
        ({"kind": "generate", "name": "a", "model": str(CLASSIFIER)}, "cannot generate"),
        (
            {"kind": "generate", "name": "a", "max_tokens": 5000},
            r"has 2048 positions.*Set max_tokens\.",
        ),
        ({"kind": "generate", "name": "a", "model": "no/such/place"}, "no/such/place"),
    ],
)
def test_an_unsuitable_model_is_refused_before_any_row(
    write_source: Write, job_settings: Settings, step: dict[str, Any], message: str
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    settings = job_settings()
    settings["steps"] = [step]
    with pytest.raises(InputError, match=message):
        run(settings)


def test_weights_changed_between_plan_and_load_are_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(CAUSAL, model)
    write_source("a.parquet", {"text": ["x"]})
    job = JobConfig.model_validate(job_settings(model={"path": str(model), "dtype": "bfloat16"}))
    run = plan_run(job)
    work = assign(job, run, prepare_models(job))
    os.utime(model / "pytorch_model-00001-of-00003.bin")
    changed = pytest.raises(InputError, match="was changed after this run digested it")
    with changed, session(run):
        answer(work.bundles[0].assignments[0])


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "config.json"]
)
def test_an_adapter_changed_between_plan_and_load_is_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path, name: str
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    model = write_adapter(tmp_path, "adapter").model_dump()
    job = JobConfig.model_validate(job_settings(model=model))
    run = plan_run(job)
    work = assign(job, run, prepare_models(job))
    (tmp_path / "adapter" / "README.md").touch()
    (tmp_path / "adapter" / name).touch()
    message = r"with the adapter .* was changed after this run digested it"
    with pytest.raises(InputError, match=message), session(run):
        answer(work.bundles[0].assignments[0])
