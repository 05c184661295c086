"""The benchmark's own command, on a model of toy size: it runs, and everyone gives the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

OURS = {"glmbatch", "transformers/row-by-row"}


def run(cache: Path, *arguments: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "benchmarks/engine.py",
        "--shape",
        "tiny",
        "--rows",
        "4",
        "--rounds",
        "1",
        *arguments,
    ]
    command += ["--slow-rows", "2", "--cache", str(cache), "--peers-dir", str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def assert_same_answers(judged: dict[str, Any]) -> None:
    assert judged["same"] == judged["compared"] > 0
    assert judged["tokens_per_second"] > 0
    assert judged["times_ours"] > 0


@pytest.mark.slow
def test_ours_is_measured_against_the_ceiling_and_a_peer_that_is_not_installed_is_left_out(
    tmp_path: Path,
) -> None:
    report = run(tmp_path, "--task", "classify,generate", "--peers", "vllm", "--build", "seed")
    assert (
        report["ceiling"]["first"].keys()
        == report["ceiling"]["last"].keys()
        == {"gemm_flops", "bytes_per_second"}
    )
    for task in ("classify", "generate"):
        judged = report["tasks"][task]
        assert "vllm/bin/python" in judged.pop("vllm")["not_here"]
        assert judged.keys() == OURS
        for each in judged.values():
            assert_same_answers(each)


@pytest.mark.slow
def test_all_of_transformers_ways_give_the_same_answers(tmp_path: Path) -> None:
    tasks = run(tmp_path, "--peers", "transformers")["tasks"]
    assert {task: len(judged) for task, judged in tasks.items()} == {
        "classify": 4,
        "labels": 4,
        "generate": 5,
    }
    for judged in tasks.values():
        for each in judged.values():
            assert_same_answers(each)


@pytest.mark.slow
def test_training_is_measured_beside_a_plain_trainer() -> None:
    command = [
        sys.executable,
        "benchmarks/training.py",
        "--rows",
        "40",
        "--rounds",
        "1",
        "--method",
        "head",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    for way in ("glmbatch", "plain Trainer"):
        assert all(value > 0 for value in report[way].values())


@pytest.mark.slow
@pytest.mark.prefect
def test_the_growth_of_a_run_is_measured() -> None:
    command = [sys.executable, "benchmarks/scale.py", "fragments", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])["sizes"]["3"]
    assert measured.pop("fragments") == 3
    assert measured.keys() == {"seconds", "flow_mb", "server_mb"}
    assert all(value > 0 for value in measured.values())
