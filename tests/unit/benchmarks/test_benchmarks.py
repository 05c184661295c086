"""The benchmarks run on toy models, and their contestants give the same answers."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

OURS = {"glmbatch", "transformers/row-by-row"}
# The other ways differ from the sorted ones in the order of the rows alone.
WAYS = ("pipeline-sorted", "pairs-sorted", "static-sorted", "continuous")


def measure(script: str, *arguments: str) -> dict[str, Any]:
    """Run the benchmark and return the JSON object on its last line."""
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def measure_engine(cache: Path, *arguments: str) -> dict[str, Any]:
    size = ("--shape", "tiny", "--rows", "4", "--slow-rows", "2", "--rounds", "1")
    folders = ("--cache", str(cache), "--peers-dir", str(cache))
    return measure("engine.py", *size, *folders, *arguments)


def assert_same_answers(judged: dict[str, Any]) -> None:
    assert judged["same"] == judged["compared"] > 0
    assert judged["tokens_per_second"] > 0
    assert judged["times_ours"] > 0


@pytest.mark.slow
def test_contestants_are_reported_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("--task", "generate,sample", "--peers", "vllm", "--build", "seed", "--alone")
    report = measure_engine(tmp_path, *arguments, "--out", str(out))
    for reading in ("first", "last"):
        assert report["ceiling"][reading].keys() == {"gemm_flops", "bytes_per_second"}
    judged = report["tasks"]["generate"]
    assert "vllm/bin/python" in judged.pop("vllm")["not_here"], "a peer that is not installed"
    assert judged.keys() == OURS
    for result in judged.values():
        assert_same_answers(result)
    assert report["tasks"]["sample"]["glmbatch"]["tokens_per_second"] > 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    order = [(line["task"], line["contestant"]) for line in lines]
    generated = [("generate", name) for name in ("transformers/row-by-row", "glmbatch", "vllm")]
    assert order == [*generated, ("sample", "glmbatch"), ("sample", "vllm")]


@pytest.mark.slow
def test_questions_and_fields_are_judged(tmp_path: Path) -> None:
    size = ("--vocabulary", "2816", "--rows", "10", "--build", "seed")
    tasks = measure_engine(tmp_path, "--task", "questions,fields", "--peers", "", *size)["tasks"]
    assert_same_answers(tasks["questions"]["glmbatch"])
    assert tasks["questions"]["glmbatch"]["rows"] == 5 * 10
    assert tasks["fields"]["glmbatch"]["invalid"] == 0
    assert tasks["fields"]["glmbatch"]["rows"] == 10


@pytest.mark.slow
def test_no_contestant_starts_after_the_time_limit(tmp_path: Path) -> None:
    arguments = ("--task", "sample", "--peers", "", "--build", "seed", "--alone")
    report = measure_engine(tmp_path, *arguments, "--seconds", "0")
    assert report["tasks"]["sample"] == {"glmbatch": {"not_here": "no time was left"}}


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        ("kernels", {"masked", "products", "head", "sampling"}),
        ("step", {"decode step", "decode step, one row of 1,900", "prompts", "labels"}),
        ("memory", {"memory"}),
        ("quantized", {"quantized"}),
    ],
)
def test_measurements_for_a_gpu_run_on_a_cpu(
    script: str, parts: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    path = ROOT / f"benchmarks/{script}.py"
    monkeypatch.syspath_prepend(str(path.parent))
    size = ["--shape", "tiny", "--device", "cpu", "--rows", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(path), *size])
    runpy.run_path(str(path), run_name="__main__")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["part"] for line in lines} == parts
    for line in lines:
        if "errors" in line:
            assert (line["errors"], line["same"]) == (0, line["rows"]), "answers in little memory"


def test_what_draws_share_is_read_once() -> None:
    size = ("--shape", "tiny", "--rows", "3", "--tokens", "60", "--draws", "4", "--rounds", "1")
    report = measure("draws.py", *size, "--answer", "5", "--ending", "8")
    # The first of five tokens comes from the prompt, and the last is fed to no forward.
    assert report["together_tokens"] == 3 * (60 + 4 * (8 + 4))
    assert report["apart_tokens"] == 3 * 4 * (60 + 8 + 4)
    assert report["different_texts"] == 0


@pytest.mark.slow
def test_all_transformers_variants_give_the_same_answers(tmp_path: Path) -> None:
    peers = ",".join(f"transformers/{way}" for way in WAYS)
    if os.environ.get("EVERY_VARIANT") == "1":
        peers = "transformers"
    tasks = measure_engine(tmp_path, "--peers", peers)["tasks"]
    assert tasks.keys() == {"classify", "labels", "generate"}
    contestants = {name for judged in tasks.values() for name in judged}
    assert contestants >= {*OURS, *peers.split(",")} - {"transformers"}
    for judged in tasks.values():
        for result in judged.values():
            assert_same_answers(result)


@pytest.mark.slow
def test_training_is_compared_with_a_plain_trainer() -> None:
    report = measure("training.py", "--rows", "40", "--rounds", "1", "--method", "lora")
    for way in ("glmbatch", "plain Trainer"):
        assert all(value > 0 for value in report[way].values())


@pytest.mark.slow
@pytest.mark.prefect
def test_time_and_memory_are_measured_by_size() -> None:
    measured = measure("scale.py", "fragments", "3")["sizes"]["3"]
    assert measured.pop("fragments") == 3
    assert measured.pop("engine_seconds") >= 0  # a tenth of a second may be more than it took
    assert measured.keys() == {"seconds", "flow_mb", "server_mb"}
    assert all(value > 0 for value in measured.values())


@pytest.mark.slow
@pytest.mark.prefect
def test_the_job_is_compared_with_its_engine() -> None:
    size = ("--shape", "sample", "--rows", "6", "--rows-per-fragment", "3", "--rounds", "1")
    report = measure("job.py", *size)
    assert report["same_answers"]
    for way in ("engine", "job", "flow"):
        assert report[f"{way}_seconds"] > 0
