"""The lineage of a flow run: what scheduled it, and how it ends when it is terminated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import deltalake
import pytest
import yaml

from tests.flows.commands import last_flow_run, run
from tests.openlineage import Catalogue, catalogue, check
from tests.support import ROOT, Settings, Write, run_after_another

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


def job_file(job_settings: Settings, folder: Path, server: Catalogue, **overrides: Any) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_settings(lineage__url=server.url, **overrides)))
    return str(path)


def test_a_flow_run_is_the_parent_and_gives_the_time(
    prefect_server: dict[str, str], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y"]})
    with catalogue() as server:
        job = job_file(job_settings, tmp_path, server)
        done = run(prefect_server, "-m", "glmbatch.cli.main", "run", job)
    assert done.returncode == 0, done.stderr
    assert server.kinds == ["START", "COMPLETE"]
    flow_run = last_flow_run(prefect_server)
    for event in server.events:
        check(event)
        facets = event["run"]["facets"]
        assert facets["parent"]["run"]["runId"] == flow_run["id"]
        assert facets["parent"]["job"]["name"] == "annotate"
        scheduled = facets["nominalTime"]["nominalStartTime"]
        assert scheduled[:19] == flow_run["expected_start_time"][:19]
    output = server.events[-1]["outputs"][0]
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == 2
    assert "columnLineage" in output["facets"]


def test_a_flow_runs_last_event_is_of_what_it_published(
    prefect_server: dict[str, str],
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
    out: Path,
) -> None:
    write_source("a.parquet", {"text": ["one", "two"]})
    code = (
        "from glmbatch.cli.main import main; from glmbatch.run.lineage import sending\n"
        "sending.REQUEST_SECONDS = sending.END_SECONDS = 60.0; main(['run', 'job.yaml'])"
    )
    with catalogue() as server:
        job_file(job_settings, tmp_path, server, data__format="delta")
        server.held.clear()  # so that the last event is made after another run has published
        with subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **prefect_server, "PYTHONPATH": str(ROOT)},
        ) as process:
            run_after_another(job_settings(data__format="delta"), write_source)
            assert process.poll() is None
            server.held.set()
            process.wait(timeout=120)
    assert deltalake.DeltaTable(out).version() == 1
    assert server.kinds == ["START", "COMPLETE"]
    facets = server.events[-1]["outputs"][0]["facets"]
    assert facets["version"]["datasetVersion"] == "0"


def test_a_terminated_flow_run_is_aborted(
    prefect_server: dict[str, str], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": [f"text {number}" for number in range(5_000)]})
    with catalogue() as server:
        job = job_file(job_settings, tmp_path, server)
        command = [sys.executable, "-m", "glmbatch.cli.main", "run", job]
        with subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **prefect_server}, stdout=-1, stderr=-1
        ) as process:
            until = time.monotonic() + 120
            while not server.events and time.monotonic() < until:
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)
    assert server.kinds == ["START", "ABORT"]
    check(server.events[-1])
