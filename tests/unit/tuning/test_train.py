"""What each training method changes and saves; a killed training loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.load import load_model, read_checkpoint
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.report.display import describe_progress
from glmbatch.settings.tuning import LORA_TARGETS, TuneConfig
from glmbatch.tuning.finetune import begin, newest_progress, train_run
from glmbatch.tuning.model import build_model
from glmbatch.tuning.processes import train_together
from glmbatch.tuning.report import PROGRESS, TRAINER
from glmbatch.tuning.train import train_here
from tests import forked
from tests.support import CAUSAL, ROOT, Tune
from tests.unit.glm.checkpoints import edit_config
from tests.unit.tuning.runs import trained, weights

pytestmark = [
    pytest.mark.slow,
    # peft still uses a deprecated name of transformers.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
BASE = {"path": str(CAUSAL)}
LORA: dict[str, Any] = {"model": BASE, "training__method": "lora"}


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_a_method_trains_only_its_weights(tune: Tune, method: str) -> None:
    config = tune(model=BASE, training__method=method, training__epochs=1)
    run = begin(config)
    summary = train_run(config, run)
    base, made = load_model(CAUSAL), load_model(Path(run) / "checkpoint")
    before = dict(base.model.named_parameters())
    changed = set()
    for name, weight in made.model.named_parameters():
        if not torch.equal(weight, before[name]):
            changed.add(name)
    assert made.score.out_features == 3
    if method == "head":
        assert not changed
        head = sum(weight.numel() for weight in made.score.parameters())
        assert summary["trained_parameters"] == head
    elif method == "lora":
        assert changed and all("proj" in name and "bias" not in name for name in changed)
    else:
        assert any("embed" in name for name in changed) and any("norm" in name for name in changed)


def assert_merged(run: Path) -> None:
    """The checkpoint equals the base with the adapter, loaded as a job does and rounded once."""
    merged = load_model(run / "checkpoint").state_dict()
    again = load_model(CAUSAL, adapter=run / "adapter").state_dict()
    assert merged.keys() == again.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, again[name].half().float()), name


def test_a_merged_adapter_equals_an_unmerged_one(tune: Tune) -> None:
    config = tune(**LORA, training__epochs=1, training__learning_rate=5e-3)
    run = trained(config)
    assert_merged(run)
    ids = torch.tensor(load_tokenizer(CAUSAL).encode(["it was 很好 today"]))
    head = tune(model=BASE, training__method="head")
    base = build_model(head, ("bad", "good", "so so"), "cpu").eval()
    merged = load_model(CAUSAL, adapter=run / "adapter")
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        on_the_fly = PeftModel.from_pretrained(base, run / "adapter").eval()(input_ids=ids).logits
        assert (on_the_fly - plain).abs().max() > 1e-3
        assert (merged(input_ids=ids).logits - on_the_fly).abs().max() < 1e-5


@pytest.mark.parametrize("targets", [["v_proj"], ["down_proj", "q_proj"], ["gate_up_proj"]])
def test_only_the_chosen_matrices_get_an_adapter(tune: Tune, targets: list[str]) -> None:
    fast = {"training__epochs": 1, "training__learning_rate": 5e-3}
    run = trained(tune(**LORA, **fast, training__lora_targets=targets))
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    adapted = {name.split(".")[-3] for name in saved if "lora" in name}
    assert adapted == {*targets}
    # peft itself says the same of the files.
    with_peft = PeftModel.from_pretrained(
        build_model(tune(model=BASE, training__method="head"), ("bad", "good", "so so"), "cpu"),
        run / "adapter",
    )
    assert {*with_peft.targeted_module_names} == {
        name for name, _ in with_peft.base_model.model.named_modules() if name.endswith((*targets,))
    }
    assert_merged(run)


def test_the_order_of_targets_is_the_same_run(tune: Tune) -> None:
    runs = set()
    for targets in (["q_proj", "v_proj"], ["v_proj", "q_proj", "v_proj"]):
        runs.add(begin(tune(**LORA, training__lora_targets=targets)))
    assert len(runs) == 1
    assert begin(tune(**LORA)) == begin(tune(**LORA, training__lora_targets=LORA_TARGETS))


def test_an_adapter_of_a_generator_is_merged(tune: Tune) -> None:
    config = tune(
        **LORA,
        training__epochs=1,
        training__learning_rate=5e-3,
        data__response_column="label",
        training__max_answer_tokens=8,
    )
    run = begin(config)
    assert train_run(config, run)["temperature"] == 1.0
    assert not hasattr(load_model(Path(run) / "checkpoint"), "score")
    assert_merged(Path(run))


def test_an_adapter_over_an_adapter_includes_both(tune: Tune) -> None:
    fast = {**LORA, "training__epochs": 1, "training__learning_rate": 5e-3}
    first = trained(tune(**fast))
    config = tune(**fast | {"model": {**BASE, "adapter": str(first / "adapter")}})
    second = begin(config)
    summary = train_run(config, second)
    assert summary["trained_parameters"] > 10_000, "the adapter too, not the head alone"
    assert_merged(Path(second))
    alone = read_checkpoint(CAUSAL, Path(second) / "adapter")
    assert (alone.warnings, alone.adapter.ranks if alone.adapter else ()) == ((), (32,))
    # Readable for the job's user, as the umask allows.
    modes = {file.stat().st_mode for file in Path(second).glob("*/*") if file.is_file()}
    assert len(modes) == 1
    with pytest.raises(InputError, match="has other weights"):
        load_model(first / "checkpoint", adapter=Path(second) / "adapter")


KILLED = """
import json, os, sys
from glmbatch.settings.tuning import LORA_TARGETS, TuneConfig
from glmbatch.tuning.finetune import begin, train_run
config = TuneConfig.model_validate(json.loads(sys.argv[1]))
train_run(config, begin(config))
"""


def saved(run: Path) -> set[str]:
    return {path.name for path in run.glob(f"{TRAINER}/checkpoint-*")}


def kill_after_a_save(config: TuneConfig, run: Path, delay_seconds: float) -> bool:
    """Train in a process, and kill it `delay_seconds` after a checkpoint; False if it ended."""
    process = forked.start({}, "-c", KILLED, config.model_dump_json())
    before = saved(run)
    while process.poll() is None and not saved(run) - before:
        time.sleep(0.005)
    if process.poll() is not None:
        assert process.wait() == 0
        return False
    time.sleep(delay_seconds)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return True


@pytest.mark.parametrize(
    ("more", "delays"),
    [({}, (0, 0.02, 0.04)), (LORA | {"training__lora_dropout": 0.2}, (0.02,))],
    ids=["full", "lora"],
)
def test_a_killed_training_ends_with_the_same_bits(
    tune: Tune, tmp_path: Path, more: dict[str, Any], delays: tuple[float, ...]
) -> None:
    more = more | {
        "training__gradient_accumulation": 2,
        "training__epochs": 6,
        "training__patience": 2,
    }
    undisturbed = tune(output=str(tmp_path / "undisturbed"), **more)
    expected = begin(undisturbed)
    steps = train_run(undisturbed, expected)["steps"]
    config = tune(output=str(tmp_path / "killed"), **more)
    run = Path(begin(config))
    for delay in delays:  # during and after a save
        assert kill_after_a_save(config, run, delay)
    assert train_run(config, str(run))["steps"] == steps
    for name, weight in weights(expected).items():
        assert torch.equal(weight, weights(run)[name]), name


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights that the Trainer saved last, in float32; the result is rounded to 16 bits."""
    (folder,) = run.glob(f"{TRAINER}/checkpoint-*")
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("more", [{}, LORA | {"training__lora_dropout": 0.0}], ids=["full", "lora"])
def test_two_processes_equal_one_with_larger_batches(tune: Tune, more: dict[str, Any]) -> None:
    # No dropout and no short last batch, so the batches are the same.
    more = more | {"training__epochs": 1, "training__batch_rows": 6}
    alone = tune(training__gradient_accumulation=2, **more)
    one = Path(begin(alone))
    train_here(alone, one)
    together = tune(training__processes=2, **more)
    two = Path(begin(together))
    train_together(together, two)
    # Both the steps and the log of the processes are seen from outside.
    counts = json.loads((two / TRAINER / PROGRESS).read_text())
    assert 0 < counts["done"] <= counts["total"]
    assert "step " in (two / "processes.log").read_text()
    for name, weight in last_weights(one).items():
        torch.testing.assert_close(last_weights(two)[name], weight, rtol=0, atol=1e-4)
    assert train_run(together, str(two))["steps"] == train_run(alone, str(one))["steps"]


def test_steps_are_seen_while_a_training_runs(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmbatch.tuning.trainer.PROGRESS_SECONDS", 0.0)
    config = tune(training__epochs=2)
    shown = []
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train_run, config, begin(config))
        while not training.done():
            shown.append(newest_progress())
            time.sleep(0.005)
    steps = training.result()["steps"]
    last = [counts for counts in shown if counts.unit == "steps"][-1]
    assert 0 < last.done <= last.total == steps and last.note.startswith("loss=")
    assert f"stage=training steps={last.done}/{steps} " in describe_progress(last)
    assert newest_progress().unit == "answers"


def test_no_process_outlives_a_killed_training(tune: Tune) -> None:
    config = tune(training__processes=2, training__epochs=100)
    code = (
        "import sys; from pathlib import Path; from glmbatch.settings.tuning import TuneConfig\n"
        "from glmbatch.tuning.processes import train_together\n"
        "train_together(TuneConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, config.model_dump_json(), begin(config)]
    with subprocess.Popen(command, cwd=ROOT) as started:
        training = psutil.Process(started.pid)
        family: list[psutil.Process] = []
        until = time.monotonic() + 120
        while len(family) < 3 and time.monotonic() < until:  # torchrun and two processes
            time.sleep(0.1)
            family = training.children(recursive=True)
        started.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert len(family) >= 3 and not alive


def test_an_error_of_one_process_is_raised(tune: Tune) -> None:
    config = tune(training__processes=2, training__batch_rows=65_536)
    with pytest.raises(InputError, match="training needs about"):
        train_run(config, begin(config))


def test_a_non_finite_loss_stops_the_run(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tune(training__epochs=3)
    run = Path(begin(config))
    cross_entropy = torch.nn.functional.cross_entropy
    calls = []

    def failing(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(*arguments, **options) * (torch.nan if len(calls) == 25 else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", failing)
    place = r"(a.parquet row \d+|validation row)"
    with pytest.raises(InputError, match=rf"step \d+: the loss is nan, first at .*{place}"):
        train_run(config, str(run))
    assert list(run.glob(f"{TRAINER}/checkpoint-*/trainer_state.json")), "the last good one stays"
    assert not (run / "trained.json").exists()
    train_run(config, str(run))


def test_a_base_without_chat_cannot_learn_to_generate(tune: Tune, tmp_path: Path) -> None:
    base = shutil.copytree(CAUSAL, tmp_path / "codegeex2-6b")
    edit_config(base, _name_or_path="THUDM/codegeex2-6b")
    config = tune(**{**LORA, "model": {"path": str(base)}}, data__response_column="label")
    with pytest.raises(InputError, match="CodeGeeX2 has no chat format"):
        train_run(config, begin(config))


def test_too_little_memory_is_refused_at_the_start(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmbatch.tuning.model.free_memory_bytes", lambda device: 100 * 2**20)
    config = tune(training__batch_rows=10_000)
    message = r"needs about .* GiB; 0\.1 are free\. Set training\.batch_rows to \d+, or"
    with pytest.raises(InputError, match=message):
        train_run(config, begin(config))
