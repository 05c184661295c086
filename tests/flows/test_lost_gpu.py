"""A GPU that fails for the rest of its process: its rows are asked again, and nothing for ever."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.flows.commands import last_flow_run, log_lines, rows, run_new
from tests.support import Settings, Write

pytestmark = [pytest.mark.prefect, pytest.mark.slow]

# In the first LOSSES processes that run a model, forwards fail after the first FORWARDS of them.
FAILING = """
import os, sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "glmbatch.glm.model.network":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), fail(module))
        return spec

def fail(module):
    run = module.Network._run
    forwards = 0

    def failing(*arguments):
        nonlocal forwards
        forwards += 1
        own, others = f"{os.environ['LOST']}/{os.getpid()}", os.listdir(os.environ["LOST"])
        fails = os.path.exists(own) or len(others) < int(os.environ["LOSSES"])
        if fails and forwards > int(os.environ["FORWARDS"]):
            open(own, "w").close()
            error = "CUDA error: an illegal memory access was encountered\\nCompile with ..."
            raise module.torch.AcceleratorError(error)
        return run(*arguments)

    module.Network._run = failing

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """A folder with a file for each process whose GPU failed."""
    (tmp_path / "lost").mkdir()
    return tmp_path / "lost"


@pytest.fixture
def job(
    tmp_path: Path, job_settings: Settings, write_source: Write
) -> Callable[..., dict[str, Any]]:
    write_source("a.parquet", {"text": [f"row {row}" for row in range(64)]})

    def make(out: str, **runtime: Any) -> dict[str, Any]:
        settings = job_settings(data__output=str(tmp_path / out))
        settings["runtime"] |= runtime
        return settings

    return make


@pytest.fixture
def run_losing(
    prefect_server: dict[str, str], lost: Path, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a job whose first `losses` processes lose their GPU after some `forwards`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAILING)

    def run_job_losing(
        job: dict[str, Any], losses: int, forwards: int
    ) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        places = {"PYTHONPATH": str(tmp_path / "site"), "LOST": str(lost), "LOSSES": str(losses)}
        places["FORWARDS"] = str(forwards)
        return run_new({**prefect_server, **places}, "-m", "glmbatch.cli.main", "run", str(path))

    return run_job_losing


@pytest.mark.parametrize(
    "runtime",
    [
        {"engine_process": True},
        pytest.param(
            {"cluster": "ray", "cluster_workers": 2},
            marks=pytest.mark.skipif(
                find_spec("prefect_ray") is None, reason="needs pip install 'glmbatch[ray]'"
            ),
        ),
    ],
)
def test_the_rows_of_a_lost_gpu_are_asked_again(
    job: Callable[..., dict[str, Any]],
    run_losing: Callable[..., subprocess.CompletedProcess[str]],
    prefect_server: dict[str, str],
    lost: Path,
    tmp_path: Path,
    runtime: dict[str, Any],
) -> None:
    run_job(JobConfig.model_validate(job("undisturbed")))
    ended = run_losing(job("out", **runtime), losses=1, forwards=20)
    assert ended.returncode == 0, ended.stderr
    assert len(os.listdir(lost)) == 1
    assert last_flow_run(prefect_server)["state_type"] == "COMPLETED"
    assert rows(tmp_path / "out") == rows(tmp_path / "undisturbed")
    assert verify(tmp_path / "out").findings == ()
    told = [line for line in log_lines(prefect_server) if "the GPU failed" in line]
    # In a cluster, the log of the lost process is Ray's.
    assert len(told) == ("cluster" not in runtime)
    assert "Traceback" not in "".join(told) + ended.stderr


def test_gpus_that_always_fail_end_the_run(
    job: Callable[..., dict[str, Any]],
    run_losing: Callable[..., subprocess.CompletedProcess[str]],
    lost: Path,
) -> None:
    ended = run_losing(job("out", engine_process=True, retries=2), losses=10**6, forwards=0)
    assert ended.returncode == 1, ended.stderr
    assert "the GPU failed: CUDA error: an illegal memory access" in ended.stderr
    assert "Traceback" not in ended.stderr
    # Two fragments are in flight, and each is tried three times.
    assert 3 <= len(os.listdir(lost)) <= 6
