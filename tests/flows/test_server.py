"""The server that a run starts for itself ends with the run, however the run ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from glmbatch.cli.server import RUN_PROCESS, TETHERED, end_leftovers
from tests.support import ROOT, Settings, Write, committed

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


@pytest.fixture
def run(
    tmp_path: Path, job_settings: Settings, write_source: Write
) -> Iterator[subprocess.Popen[bytes]]:
    """A run of the command line with its own server. It takes about a minute."""
    write_source("a.parquet", {"text": [f"row {n}" for n in range(200)]})
    settings = job_settings(data__rows_per_fragment=10, runtime__max_slots=1)
    settings["steps"][1]["max_tokens"] = 60
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    with subprocess.Popen(
        [sys.executable, "-m", "glmbatch.cli.main", "run", str(tmp_path / "job.yaml")],
        cwd=ROOT,
        env={**environment, "PREFECT_HOME": str(tmp_path / "home")},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as started:
        yield started
        started.kill()


def server_of(run: subprocess.Popen[Any]) -> psutil.Process:
    """Wait for the server that `run` starts."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for child in psutil.Process(run.pid).children():
            if TETHERED in child.cmdline():
                return child
        time.sleep(0.02)
    raise AssertionError("the run started no server")


def assert_ends(run: subprocess.Popen[Any], family: list[psutil.Process]) -> None:
    run.wait(60)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_no_server_outlives_a_killed_run(run: subprocess.Popen[bytes], out: Path) -> None:
    server = server_of(run)
    until = time.monotonic() + 240
    while not committed(out) and time.monotonic() < until:
        time.sleep(0.05)
    family = [server, *server.children(recursive=True)]
    run.kill()
    assert_ends(run, family)


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGINT] * 3, [signal.SIGTERM] * 3])
def test_no_server_outlives_a_run_ended_at_startup(
    run: subprocess.Popen[bytes], signals: list[signal.Signals]
) -> None:
    server = server_of(run)
    for number in signals:  # further Ctrl-Cs come while the first is being handled
        if run.poll() is None:
            os.killpg(run.pid, number)
            time.sleep(0.1)
    assert_ends(run, [server])


def test_a_wrong_job_shows_while_its_server_starts(
    tmp_path: Path, job_settings: Settings, write_source: Write
) -> None:
    """The server waits for a database that never answers, so the run cannot wait for the server."""
    write_source("a.parquet", {"body": ["one"]})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_settings()))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        database = f"postgresql+asyncpg://me:no@127.0.0.1:{silent.getsockname()[1]}/nights"
        with subprocess.Popen(
            [sys.executable, "-m", "glmbatch.cli.main", "run", str(tmp_path / "job.yaml")],
            cwd=ROOT,
            env={
                **{key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"},
                "PREFECT_HOME": str(tmp_path / "home"),
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
            },
            stderr=subprocess.PIPE,
            text=True,
        ) as wrong:
            server = server_of(wrong)
            _, error = wrong.communicate(timeout=60)
    assert wrong.returncode == 2
    assert error.startswith("glmbatch: ")
    assert "no column 'text'" in error
    assert error.count("\n") == 1
    assert_ends(wrong, [server])


def test_the_next_run_ends_servers_of_killed_runs(tmp_path: Path) -> None:
    """The tether does not end these servers, as if another process had inherited it."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    servers = {}
    tethered = [TETHERED, "prefect"]
    for name, module, run_process in (
        ("of a dead run", tethered, dead.pid),
        ("of a living run", tethered, os.getpid()),
        ("of somebody else", ["prefect"], dead.pid),
    ):
        servers[name] = subprocess.Popen(
            [sys.executable, "-m", *module, "server", "start", "--port", "0"],
            env={**os.environ, "PREFECT_HOME": str(tmp_path), RUN_PROCESS: str(run_process)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    try:
        end_leftovers()
        living = [name for name, server in servers.items() if server.poll() is None]
        assert living == ["of a living run", "of somebody else"]
    finally:
        for server in servers.values():
            server.kill()
            server.communicate()
