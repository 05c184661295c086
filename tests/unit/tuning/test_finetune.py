"""From labelled rows to a promoted checkpoint: what it is, that it is better, and that a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.doctor import examine
from glmbatch.glm.checkpoint.load import load_model
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig, ModelConfig
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.finetune import begin, evaluate_run, finetune, promote, train_run
from glmbatch.tuning.train import TRAINER, TrainingRow, _pad, _Rows
from tests.conftest import CAUSAL, ROOT
from tests.unit.tuning.rows import labelled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing:FutureWarning"
    ),  # peft asks by a name of before
]
Tune = Callable[..., TuneConfig]
Write = Callable[..., Path]
BASE = {"path": str(CAUSAL)}


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "checkpoint" / "model.safetensors")


def test_a_model_from_scratch_learns_is_reported_and_answers_a_job(
    tune: Tune, tmp_path: Path, write_source: Write
) -> None:
    report = finetune(tune(training__epochs=8))
    assert report.scores.accuracy > 0.9
    assert report.baseline.accuracy > 0.9
    assert report.promoted
    run = Path(report.checkpoint).parent
    page = (run / "report.html").read_text()
    assert "<svg" in page and "://" not in page
    assert report.baseline_name in page
    card = (run / "checkpoint" / "README.md").read_text()
    assert all(digest in card for digest in report.audit.files.values())
    assert not examine(run / "checkpoint").problems
    assert not (run / TRAINER).exists()
    write_source("tonight.parquet", {"text": ["it was awful 77", "room great 12"]})
    job = JobConfig.model_validate(
        {
            "data": {
                "input": str(tmp_path / "in" / "tonight.parquet"),
                "output": str(tmp_path / "out"),
            },
            "model": str(tmp_path / "tuned" / "current" / "checkpoint"),
            "steps": [{"kind": "classify", "name": "mood"}],
        }
    )
    run_job(job)
    answers = (
        pq.read_table(tmp_path / "out" / "tonight-0000000000.parquet").column("mood").to_pylist()
    )
    assert answers == ["bad", "good"]


def test_run_again_it_is_done_and_only_better_ones_are_promoted(tune: Tune, tmp_path: Path) -> None:
    good = finetune(tune(training__epochs=8))
    current = tmp_path / "tuned" / "current"
    trained = (current / "trained.json").stat().st_mtime_ns
    assert finetune(tune(training__epochs=8)) == good
    assert (current / "trained.json").stat().st_mtime_ns == trained
    worse = finetune(tune(training__epochs=1, training__learning_rate=1e-6))
    assert not worse.promoted
    assert worse.current is not None and worse.current.accuracy == good.scores.accuracy
    assert "must be better" in worse.reason
    assert current.resolve().name == good.run


def test_no_row_is_tested_on_that_the_current_one_has_learned(tune: Tune) -> None:
    first = finetune(tune(training__epochs=8))
    again = finetune(tune(training__epochs=8, data__seed=1, min_gain=1))
    assert again.current is not None
    assert again.scores.rows == again.current.rows < first.scores.rows
    assert any("was trained on their texts" in warning for warning in again.audit.warnings)
    with pytest.raises(InputError, match="was trained on all test rows"):
        finetune(tune(training__epochs=8, data__seed=1, data__test_share=0.01))


def test_what_always_says_one_label_or_lacks_one_is_not_promoted(
    tune: Tune, write_source: Write
) -> None:
    first = finetune(tune(training__epochs=1, training__learning_rate=1e-7))
    assert (first.promoted, first.current) == (False, None)
    assert "always" in first.reason
    good = finetune(tune(training__epochs=8))
    assert good.promoted
    rows = labelled(240)
    kept = [at for at, label in enumerate(rows["label"]) if label != "bad"]
    for day in range(2):
        write_source(
            f"day={day}/a.parquet",
            {name: [values[at] for at in kept] for name, values in rows.items()},
        )
    fewer = finetune(tune(training__epochs=8))
    assert not fewer.promoted
    assert "lacks the labels ['bad']" in fewer.reason


def test_what_was_promoted_in_between_is_compared_with_too(tune: Tune, tmp_path: Path) -> None:
    weak = tune(training__epochs=2, training__learning_rate=5e-4)
    run = begin(weak)
    train_run(weak, run)
    report = evaluate_run(weak, run)
    best = finetune(tune(training__epochs=8))
    assert best.scores.accuracy > report.scores.accuracy
    late = promote(weak, report.model_copy(update={"promoted": True}))
    assert not late.promoted
    assert (tmp_path / "tuned" / "current").resolve().name == best.run


def test_a_step_must_ask_what_training_asked(tune: Tune, tmp_path: Path) -> None:
    finetune(tune(training__epochs=4, prompt_template="Review: {text}"))
    settings: dict[str, Any] = {
        "data": {"input": str(tmp_path / "in"), "output": str(tmp_path / "out")},
        "model": str(tmp_path / "tuned" / "current" / "checkpoint"),
        "steps": [{"kind": "classify", "name": "mood"}],
    }
    with pytest.raises(InputError, match="was trained with the prompt_template"):
        run_job(JobConfig.model_validate(settings))
    settings["steps"][0]["prompt_template"] = "Review: {text}"
    assert run_job(JobConfig.model_validate(settings)).rows == 240


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_each_method_trains_what_it_says_and_nothing_else(tune: Tune, method: str) -> None:
    run = begin(tune(model=BASE, training__method=method, training__epochs=1, stored="float32"))
    config = tune(model=BASE, training__method=method, training__epochs=1, stored="float32")
    trained = train_run(config, run)
    base, made = load_model(CAUSAL), load_model(Path(run) / "checkpoint")
    changed = {
        name
        for name, weight in made.model.named_parameters()
        if not torch.equal(weight, dict(base.model.named_parameters())[name])
    }
    assert made.score.out_features == 3
    if method == "head":
        assert not changed
        assert trained["trained_parameters"] == sum(
            weight.numel() for weight in made.score.parameters()
        )
    elif method == "lora":
        assert changed and all("proj" in name and "bias" not in name for name in changed)
    else:
        assert any("embed" in name for name in changed) and any("norm" in name for name in changed)


def test_a_merged_adapter_gives_what_the_adapter_gives_on_the_fly(tune: Tune) -> None:
    config = tune(model=BASE, training__epochs=1, training__learning_rate=5e-3, stored="float32")
    run = Path(begin(config))
    train_run(config, str(run))
    merged = load_model(run / "checkpoint")
    ids = torch.tensor(load_tokenizer(CAUSAL).encode(["it was 很好 today"]))
    from glmbatch.tuning.train import _classifier

    base = _classifier(config, CAUSAL, ("bad", "good", "so so"), "cpu")
    with torch.no_grad():
        plain = base.eval()(input_ids=ids).logits
        on_the_fly = PeftModel.from_pretrained(base, run / "adapter").eval()(input_ids=ids).logits
        assert (on_the_fly - plain).abs().max() > 1e-3
        assert (merged(input_ids=ids).logits - on_the_fly).abs().max() < 1e-5
    again = load_model(CAUSAL, adapter=run / "adapter")
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), "saved and loaded, bit for bit"


KILLED = """
import json, os, sys
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.finetune import begin, train_run
config = TuneConfig.model_validate(json.loads(sys.argv[1]))
train_run(config, begin(config))
"""


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_in_the_midst_training_goes_on_to_the_same_weights(
    tune: Tune, tmp_path: Path, method: str
) -> None:
    more: dict[str, Any] = {
        "training__gradient_accumulation": 2,
        "training__epochs": 6,
        "training__patience": 2,
    }
    if method == "lora":
        more |= {"model": BASE, "training__lora_dropout": 0.2}
    else:
        more |= {"training__noise": 0.2}
    undisturbed = tune(output=str(tmp_path / "undisturbed"), **more)
    expected = begin(undisturbed)
    steps = train_run(undisturbed, expected)["steps"]
    config = tune(output=str(tmp_path / "killed"), **more)
    run = Path(begin(config))
    kills = 0
    while not (run / "trained.json").exists():
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, config.model_dump_json()], cwd=ROOT
        )
        before = {path.name for path in run.glob(f"{TRAINER}/checkpoint-*")}
        while (
            process.poll() is None
            and not {p.name for p in run.glob(f"{TRAINER}/checkpoint-*")} - before
        ):
            time.sleep(0.005)
        if process.poll() is None and kills < 3:
            time.sleep(0.02 * kills)  # in the midst of saving, and after it
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills == 3
    assert json.loads((run / "trained.json").read_text())["steps"] == steps
    for name, weight in weights(expected).items():
        assert torch.equal(weight, weights(run)[name]), name


@pytest.mark.parametrize("more", [{}, {"model": BASE}], ids=["full", "lora"])
def test_two_processes_train_what_one_does_with_twice_the_batches(
    tune: Tune, more: dict[str, Any]
) -> None:
    # Steps of rows that no dropout and no rest of an epoch make different.
    more = more | {
        "training__epochs": 1,
        "training__batch_rows": 6,
        "training__lora_dropout": 0.0,
        "stored": "float32",
    }
    alone = tune(training__gradient_accumulation=2, **more)
    expected = begin(alone)
    steps = train_run(alone, expected)["steps"]
    together = tune(training__processes=2, **more)
    run = begin(together)
    assert train_run(together, run)["steps"] == steps
    for name, weight in weights(expected).items():
        torch.testing.assert_close(weights(run)[name], weight, rtol=0, atol=1e-4)


def test_what_one_of_two_processes_finds_wrong_is_told_in_one_line(tune: Tune) -> None:
    config = tune(
        training__processes=2,
        training__batch_rows=65_536,
        scratch__hidden_size=1024,
        scratch__layers=8,
    )
    with pytest.raises(InputError, match="training needs about"):
        train_run(config, begin(config))


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tune(training__epochs=3)
    run = Path(begin(config))
    cross_entropy = torch.nn.functional.cross_entropy
    calls = []

    def failing(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(*arguments, **options) * (torch.nan if len(calls) == 25 else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", failing)
    with pytest.raises(
        InputError,
        match=r"step \d+: the loss is nan, first at .*(a.parquet row \d+|validation row)",
    ):
        train_run(config, str(run))
    assert list(run.glob(f"{TRAINER}/checkpoint-*/trainer_state.json")), "the last good one is kept"
    assert not (run / "trained.json").exists()
    train_run(config, str(run))


def test_too_little_memory_is_told_before_the_start(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmbatch.tuning.train.free_memory_bytes", lambda device: 10 * 2**20)
    config = tune(training__batch_rows=10_000)
    with pytest.raises(
        InputError, match=r"needs about .* GiB, 0\.0 are free\. Set training\.batch_rows to \d+, or"
    ):
        train_run(config, begin(config))


def test_rare_labels_count_more_when_weights_are_balanced(tune: Tune, write_source: Write) -> None:
    rows = labelled(240)
    keep = [at for at, label in enumerate(rows["label"]) if label != "bad" or at % 12 == 0]
    for day in range(2):
        write_source(
            f"day={day}/a.parquet",
            {name: [values[at] for at in keep] for name, values in rows.items()},
        )
    plain, balanced = (
        evaluate_run(config, _trained(config))
        for config in (
            tune(training__class_weights=way, training__epochs=2) for way in ("none", "balanced")
        )
    )
    assert balanced.scores.labels["bad"].recall >= plain.scores.labels["bad"].recall


def _trained(config: TuneConfig) -> str:
    run = begin(config)
    train_run(config, run)
    return run


def test_a_checkpoint_is_scored_on_other_rows_with_labels_it_lacks(
    tune: Tune, tmp_path: Path, write_source: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tune(training__epochs=6))
    rows = labelled(50, seed=9)
    rows["label"][0] = "another"
    file = write_source("../other.parquet", rows)
    assert (
        main(["evaluate", str(tmp_path / "tuned" / "current" / "checkpoint"), str(file), "--json"])
        == 0
    )
    scores = json.loads(capsys.readouterr().out)
    assert scores["rows"] == 50 and scores["accuracy"] > 0.85
    assert scores["labels"]["another"]["recall"] == 0
    assert main(["evaluate", str(CAUSAL), str(file)]) == 2
    assert "has no trained head" in capsys.readouterr().err


def test_settings_that_cannot_be_trained_are_told(tune: Tune) -> None:
    for overrides, message in (
        ({"training__method": "lora"}, "needs a model"),
        ({"prompt_template": "{other}"}, "takes {text}"),
        ({"scratch__hidden_size": 100}, "multiple of 16"),
        ({"metric": "rouge_l"}, "not of a model that classifies"),
        ({"data__response_column": "label", "metric": "accuracy"}, "not of a model that writes"),
        (
            {"data__response_column": "label", "training__class_weights": "balanced"},
            "no class weights",
        ),
        ({"data__valid_share": 0.5, "data__test_share": 0.5}, "too few rows"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(**overrides)
    with pytest.raises(InputError, match="no such"):
        finetune(tune(model=ModelConfig(path="/nowhere").model_dump()))


WRITES = {
    "data__response_column": "label",
    "training__max_answer_tokens": 8,
    "training__learning_rate": 5e-3,
}


def test_a_model_learns_to_write_answers_and_a_job_uses_it(tune: Tune, tmp_path: Path) -> None:
    report = finetune(tune(**WRITES, training__epochs=12, scratch__layers=1))
    assert report.promoted and report.baseline is None
    assert report.scores.rouge_l > 0.6
    page = (Path(report.checkpoint).parent / "report.html").read_text()
    assert "ROUGE-L" in page and "Confusion" not in page
    job = JobConfig.model_validate(
        {
            "data": {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "limit": 20},
            "model": report.checkpoint,
            "steps": [{"kind": "generate", "name": "answer", "max_tokens": 8}],
        }
    )
    assert run_job(job).rows == 20
    assert finetune(tune(**WRITES, training__epochs=12, scratch__layers=1)) == report


def test_only_the_answer_counts_and_an_adapter_is_merged_for_writing_too(tune: Tune) -> None:
    config = tune(**WRITES, model=BASE, training__epochs=1, stored="float32")
    run = Path(begin(config))
    trained = train_run(config, str(run))
    assert trained["temperature"] == 1.0
    merged = load_model(run / "checkpoint")
    assert not hasattr(merged, "score")
    again = load_model(CAUSAL, adapter=run / "adapter")
    assert all(
        torch.equal(weight, again.state_dict()[name])
        for name, weight in merged.state_dict().items()
    )
    rows = [TrainingRow([5, 6, 7], 0, "a", [8, 9]), TrainingRow([5], 0, "b", [6, 7, 8])]
    batch = _pad([_Rows(rows)[0], _Rows(rows)[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9, -100], [6, 7, 8, -100, -100]]


def test_the_loss_of_answers_is_that_of_transformers(tune: Tune) -> None:
    rows = [TrainingRow([5, 6, 7], 0, "a", [8, 9]), TrainingRow([11], 0, "b", [6, 7, 8])]
    batch = _pad([_Rows(rows)[0], _Rows(rows)[1]])
    model = load_model(CAUSAL)
    shifted = torch.roll(batch["labels"], 1, dims=1)
    theirs = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=shifted
    ).loss
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    ours = (
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="sum")
        / 5
    )
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
