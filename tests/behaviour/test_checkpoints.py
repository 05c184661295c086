"""A faulty checkpoint stops a job before its first row or within its first fragments."""

from __future__ import annotations

import html
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from glmbatch.cli.plan import describe_plan
from glmbatch.errors import AuditError, InputError
from glmbatch.glm.checkpoint.doctor import describe, examine
from glmbatch.glm.model.network import Network
from glmbatch.report.text import describe as describe_run
from glmbatch.run.preview import preview
from glmbatch.run.table import annotate_table
from glmbatch.settings.job import JobConfig
from tests.support import CAUSAL, CLASSIFY, Settings, Write, committed, run
from tests.unit.glm.checkpoints import edit_config, read_state, write_weights

WRITE = {"kind": "generate", "name": "reply", "prompt_template": "{text}", "max_tokens": 4}


def altered_copy(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Copy the golden language model to `directory` and apply `change` to its weights."""
    shutil.copytree(CAUSAL, directory)
    state = read_state(directory)
    change(state)
    for pattern in ("*.bin", "*.index.json"):
        for path in directory.glob(pattern):
            path.unlink()
    write_weights(directory, state)
    return directory


def overflow(state: dict[str, torch.Tensor]) -> None:
    """Scale the weights: they stay finite, but the scores overflow float16."""
    state["transformer.encoder.final_layernorm.weight"] *= 3e4
    state["transformer.output_layer.weight"] *= 100


@pytest.mark.parametrize("spoiled", ["nan", "inf", "-inf"])
def test_non_finite_weights_stop_a_job_before_its_rows(
    tmp_path: Path, write_source: Write, job_settings: Settings, out: Path, spoiled: str
) -> None:
    key = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[key][3, 5] = float(spoiled)

    model = altered_copy(tmp_path / "model", spoil)
    write_source("a.parquet", {"text": ["one", "two"]})
    settings = job_settings(model__path=str(model), steps=[CLASSIFY])
    for attempt in (run, lambda settings: preview(JobConfig.model_validate(settings))):
        with pytest.raises(InputError, match=rf"'{key}' has 1 of [\d,]+ values that are not"):
            attempt(settings)
    assert not committed(out)


@pytest.mark.parametrize("step", [CLASSIFY, WRITE], ids=["classify", "generate"])
def test_a_job_stops_early_when_every_row_fails(
    tmp_path: Path, write_source: Write, job_settings: Settings, out: Path, step: dict[str, Any]
) -> None:
    model = altered_copy(tmp_path / "model", overflow)
    write_source("a.parquet", {"text": [f"text {number}" for number in range(200)]})
    settings = job_settings(
        model={"path": str(model), "dtype": "float16"}, steps=[step], data__rows_per_fragment=10
    )
    with pytest.raises(InputError) as stopped:
        run(settings)
    assert "failed on all 20 rows that it was asked" in str(stopped.value)
    assert "not finite in float16" in str(stopped.value)
    assert "set model.dtype to float32 or bfloat16" in str(stopped.value)
    assert len(committed(out)) == 1  # of 20 fragments
    settings["model"]["dtype"] = "bfloat16"
    assert run(settings).faulty_rows == 0


def test_a_job_stops_when_no_row_fits_in_memory(
    write_source: Write, job_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Network, "prefill", full)
    texts = ["word " * (number % 9) + str(number) for number in range(90)]
    write_source("a.parquet", {"text": texts})
    with pytest.raises(
        InputError, match=r"failed on all 30 rows .* not enough memory on cpu for one prompt"
    ):
        run(job_settings(steps=[CLASSIFY], data__rows_per_fragment=15))
    assert len(committed(out)) == 1


def test_some_failed_rows_do_not_stop_a_job(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job continues if every row of one file fails, and if they fail again the next night."""
    prefill = Network.prefill

    def short_of_memory(self: Network, prompts: Any, prefix: Any, *store: Any) -> Any:
        places = prefix.places if prefix is not None else 0
        if any(len(prompt.ids) + places > 90 for prompt in prompts):
            raise torch.OutOfMemoryError("out of memory")
        return prefill(self, prompts, prefix, *store)

    monkeypatch.setattr(Network, "prefill", short_of_memory)
    write_source("a.parquet", {"text": [f"{number} " + "long " * 90 for number in range(30)]})
    write_source("b.parquet", {"text": [f"short {number}" for number in range(30)]})
    settings = job_settings(steps=[CLASSIFY], data__rows_per_fragment=30, max_error_rate=0.9)
    assert run(settings).faulty_rows == 30
    settings["data"]["rows_per_fragment"] = 10
    assert run(settings).faulty_rows == 30


def test_a_failed_table_shows_the_reason(tmp_path: Path) -> None:
    model = altered_copy(tmp_path / "model", overflow)
    job = {"model": {"path": str(model), "dtype": "float16"}, "steps": [CLASSIFY]}
    table = pa.table({"text": ["one", "two"]})
    reason = "not finite in float16: set model.dtype to float32 or bfloat16"
    for error in annotate_table(table, job).column("mood_error").to_pylist():
        assert reason in error
    with pytest.raises(AuditError, match=rf"all 2 rows failed.*The model failed: .*{reason}"):
        annotate_table(table, {**job, "max_error_rate": 0.5})
    # A longer table stops early.
    long = pa.table({"text": [f"text {number}" for number in range(60)]})
    with pytest.raises(
        InputError, match=rf"failed on all 20 rows .* so the run stopped: .*{reason}"
    ):
        annotate_table(long, {**job, "data": {"rows_per_fragment": 10}})


def test_the_audit_error_stays_in_the_exception_chain(
    tmp_path: Path, write_source: Write, job_settings: Settings
) -> None:
    model = {"path": str(altered_copy(tmp_path / "model", overflow)), "dtype": "float16"}
    write_source("a.parquet", {"text": ["one", "two"]})
    with pytest.raises(AuditError) as stopped:
        run(job_settings(model=model, steps=[CLASSIFY], max_error_rate=0.5))
    found = stopped.value.__cause__
    assert found is not None and "The model failed: " in str(found)
    audited = found.__cause__
    assert isinstance(audited, AuditError)
    assert str(found).startswith(str(audited)) and "The model failed" not in str(audited)


def test_every_command_shows_checkpoint_notes(
    tmp_path: Path, write_source: Write, job_settings: Settings
) -> None:
    model = tmp_path / "model"
    shutil.copytree(CAUSAL, model)
    (model / "tokenizer_config.json").unlink()
    edit_config(model, _name_or_path="/data/out", rotary_percent=0.5)
    write_source("a.parquet", {"text": ["one", "two"]})
    settings = job_settings(model__path=str(model), steps=[CLASSIFY])
    odd = ("config.json: 'rotary_percent' is unknown", "no file names the model")
    plan = preview(JobConfig.model_validate(settings))
    summary = run(settings)
    assert summary.report is not None
    page = Path(summary.report).read_text()
    for text in (describe(examine(model)), describe_plan(plan), describe_run(summary), page):
        for note in odd:
            assert note in html.unescape(text)
    assert summary.notes == plan.models[0].notes
    both = [CLASSIFY, {**CLASSIFY, "name": "other", "model": {"path": str(CAUSAL)}}]
    named = run(job_settings(model__path=str(model), steps=both, data__output=str(tmp_path / "2")))
    assert [note.startswith(f"{model}: ") for note in named.notes] == [True, True]
