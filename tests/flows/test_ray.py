"""The flow on a real Ray cluster of two engine processes: a lost process, an interrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.flows.commands import last_flow_run, rows, start_new
from tests.support import Settings, Write, committed

# An import here would add seconds to the collection of tests.
MISSING = find_spec("prefect_ray") is None
pytestmark = [
    pytest.mark.prefect,
    pytest.mark.slow,
    pytest.mark.skipif(MISSING, reason="needs pip install 'glmbatch[ray]'"),
]

# Every process of the run logs what it loads to its own file.
TELLING = """
import logging, os
logger = logging.getLogger("glmbatch.run.session")
logger.addHandler(logging.FileHandler(f"{os.environ['LOADS']}/{os.getpid()}", delay=True))
logger.setLevel(logging.INFO)
"""


@pytest.fixture
def environment(prefect_server: dict[str, str], tmp_path: Path) -> dict[str, str]:
    (tmp_path / "loads").mkdir()
    (tmp_path / "sitecustomize.py").write_text(TELLING)
    return {**prefect_server, "PYTHONPATH": str(tmp_path), "LOADS": str(tmp_path / "loads")}


@pytest.fixture
def job_file(tmp_path: Path, job_settings: Settings, write_source: Write) -> Callable[..., str]:
    """Make the job file of a run of about 15 seconds that writes to the given folder."""
    for day in range(3):
        write_source(
            f"day={day}/a.parquet", {"text": [f"day {day} row {row}" for row in range(60)] + [None]}
        )

    def write(out: str, **runtime: Any) -> str:
        settings = job_settings(
            data__output=str(tmp_path / out), data__rows_per_fragment=15, runtime__max_slots=2
        )
        settings["steps"][1]["max_tokens"] = 40
        settings["runtime"] |= runtime
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def busy_engine(run: subprocess.Popen[bytes]) -> psutil.Process:
    """Wait for an engine process of `run` that is in the middle of a call."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for child in psutil.Process(run.pid).children(recursive=True):
            if _title(child).startswith("ray::ClusterProcess.call"):
                return child
    raise AssertionError("no engine process was busy")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for_answers(run: subprocess.Popen[bytes], out: Path, files: int) -> None:
    until = time.monotonic() + 400
    while len(committed(out)) < files and run.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert files <= len(committed(out)) < 24, "the run was not caught at work"


def test_a_lost_engine_process_is_replaced(
    environment: dict[str, str], job_file: Callable[..., str], tmp_path: Path
) -> None:
    settings = yaml.safe_load(Path(job_file("threads")).read_text())
    run_job(JobConfig.model_validate(settings))
    run = start_new(environment, job_file("out", cluster="ray", cluster_workers=2))
    wait_for_answers(run, tmp_path / "out", 5)
    lost = busy_engine(run)
    lost.kill()
    assert run.wait(400) == 3
    assert last_flow_run(environment)["state_type"] == "COMPLETED"
    assert rows(tmp_path / "out") == rows(tmp_path / "threads")
    assert verify(tmp_path / "out").findings == ()
    loads = {}
    for path in (tmp_path / "loads").iterdir():
        loads[path.name] = path.read_text().count("loading")
    assert str(lost.pid) in loads
    # One load each: two engine processes, and the replacement.
    assert sorted(loads.values()) == [1, 1, 1]


def test_an_interrupted_run_leaves_no_ray_process(
    environment: dict[str, str], job_file: Callable[..., str], tmp_path: Path
) -> None:
    job = job_file("out", cluster="ray", cluster_workers=2)
    run = start_new(environment, job)
    wait_for_answers(run, tmp_path / "out", 3)
    children = psutil.Process(run.pid).children(recursive=True)
    assert any("raylet" in _title(child) for child in children)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal sends it
    assert run.wait(60) == 130
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [_title(process) for process in alive]
    before = committed(tmp_path / "out")
    settings = yaml.safe_load(Path(job_file("out")).read_text())
    run_job(JobConfig.model_validate(settings))
    assert before <= committed(tmp_path / "out"), "committed inference was repeated"
    assert verify(tmp_path / "out").findings == ()


def test_a_machine_that_cannot_see_the_output_is_named(tmp_path: Path) -> None:
    from tasks.engines import complaint_of

    lock = tmp_path / "out" / "_glmbatch" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("process 1 of another")
    assert complaint_of(str(lock), "process 1 of another") is None
    assert "does not see the files that process 2 of here writes to" in str(
        complaint_of(str(lock), "process 2 of here")
    )
    assert "on a file system that all machines" in str(
        complaint_of(str(tmp_path / "none" / "_glmbatch" / "lock"), "process 1 of another")
    )


@pytest.mark.parametrize(
    ("cpus", "workers", "share"),
    [([8], 2, 4), ([8, 8], 2, 8), ([8, 8], 3, 4), ([16, 4], 3, 5), ([2], 3, 1)],
)
def test_engine_processes_share_their_machines_cores(
    cpus: list[int], workers: int, share: int
) -> None:
    from tasks.cluster import share_of_cpus

    assert share_of_cpus(cpus, workers) == share
