"""A job killed at random moments and run again publishes the output of an undisturbed run.

No committed work is repeated.

The tests start whole processes against a real server, as a user does. They `kill -9` either the
run, whose worker and flow are one process, or its server. KILLS sets the number of kills (50 for
acceptance), and KILLS_SEED their moments. SOAK_FLOWS sets that of kills between nights of change
(tests/behaviour/test_soak.py has them without a server).
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from glmbatch.cli.server import own_server
from glmbatch.ledger.verification import verify
from tests.flows.commands import rows, start
from tests.forked import Program
from tests.soak.history import described, soak
from tests.soak.runs import Flows
from tests.support import Settings, Write, committed

pytestmark = [pytest.mark.prefect, pytest.mark.slow]
KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("KILLS_SEED", "1"))
logger = logging.getLogger(__name__)
SOAK = int(os.environ.get("SOAK_FLOWS", "0"))


@pytest.fixture
def job_file(tmp_path: Path, job_settings: Settings, write_source: Write) -> Callable[[str], str]:
    """Make the job file of a run that writes to the given folder."""
    for day in range(3):
        write_source(
            f"day={day}/a.parquet", {"text": [f"day {day} row {row}" for row in range(30)] + [None]}
        )

    def write(out: str) -> str:
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(job_settings(data__output=str(tmp_path / out))))
        return str(path)

    return write


def beginning(process: Program, out: Path) -> float:
    """The time at which the run locks its output. From then on it writes all the time."""
    while not (out / "_glmbatch" / "lock").exists() and process.poll() is None:
        time.sleep(0.01)
    return time.monotonic()


def _listens(process: psutil.Process, port: str) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE and port in process.cmdline()


@pytest.mark.timeout(300 + 60 * KILLS)
def test_a_killed_run_resumes_to_the_same_output(
    prefect_server: dict[str, str], job_file: Callable[[str], str], tmp_path: Path
) -> None:
    process = start(prefect_server, job_file("undisturbed"))
    began = beginning(process, tmp_path / "undisturbed")
    assert process.wait(300) == 3
    seconds = time.monotonic() - began
    expected = rows(tmp_path / "undisturbed")
    moments = random.Random(SEED)
    killed = 0
    for number in range(KILLS):
        out = tmp_path / f"out-{number}"
        job = job_file(f"out-{number}")
        process = start(prefect_server, job)
        after = seconds * moments.uniform(0, 0.9)
        beginning(process, out)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        before = committed(out)
        assert start(prefect_server, job).wait(300) == 3, f"kill {number} after {after:.2f} s"
        assert rows(out) == expected, f"kill {number} after {after:.2f} s"
        findings = verify(out).findings
        assert findings == (), f"kill {number} after {after:.2f} s: {findings}"
        assert before <= committed(out), "committed inference was repeated"
    assert killed, "every run ended before its kill"


def test_a_killed_server_costs_no_committed_work(
    job_file: Callable[[str], str], tmp_path: Path, out: Path, prefect_server: dict[str, str]
) -> None:
    job = job_file("out")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PREFECT_HOME", str(tmp_path / "home"))
        with own_server() as client:
            process = start({**client, "PREFECT_HOME": str(tmp_path / "home")}, job)
            until = time.monotonic() + 120
            while not committed(out) and process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            before = committed(out)
            port = client["PREFECT_API_URL"].split(":")[2].split("/")[0]
            servers = [child for child in psutil.Process().children() if _listens(child, port)]
            for server in servers:
                os.killpg(server.pid, signal.SIGKILL)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                # The client keeps retrying its server for minutes.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert len(servers) == 1
    assert before, "the server was killed before any answer"
    assert start(prefect_server, job).wait(300) == 3
    assert verify(out).findings == ()
    assert before <= committed(out)
    assert json.loads((out / "_manifest.json").read_text())["files"]


@pytest.mark.skipif(not SOAK, reason="set SOAK_FLOWS to a number of kills")
@pytest.mark.timeout(300 + 60 * SOAK)
def test_nights_of_change_with_killed_flows_equal_others(
    prefect_server: dict[str, str], tmp_path: Path
) -> None:
    for tally in soak(tmp_path, SEED, SOAK, Flows(tmp_path, prefect_server)):
        logger.info("%s", described(tally))
