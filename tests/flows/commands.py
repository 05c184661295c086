"""Run the command line under the test's Prefect server, and query the server about the runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests import forked
from tests.support import ROOT, rows_of


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in a process that begins with its imports done."""
    return forked.run(environment, *command)


def run_new(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in a new Python."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=400,
    )


@contextmanager
def signed_in(environment: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of the server's API, with the password and a CSRF token."""
    user, _, password = environment["PREFECT_API_AUTH_STRING"].partition(":")
    address = environment["PREFECT_API_URL"]
    with httpx.Client(base_url=address, auth=(user, password), timeout=120) as client:
        token = client.get("/csrf-token", params={"client": "tests"}).raise_for_status().json()
        client.headers["Prefect-Csrf-Client"] = "tests"
        client.headers["Prefect-Csrf-Token"] = token["token"]
        yield client


def query(environment: dict[str, str], kind: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with signed_in(environment) as client:
        answer = client.post(f"/{kind}/filter", json=body)
    rows: list[dict[str, Any]] = answer.raise_for_status().json()
    return rows


def last_flow_run(environment: dict[str, str]) -> dict[str, Any]:
    return query(environment, "flow_runs", {"sort": "START_TIME_DESC", "limit": 1})[0]


def task_runs(environment: dict[str, str], expected: int) -> dict[str, dict[str, Any]]:
    """Task runs of the last flow run by name, as soon as the expected number is recorded.

    They may reach the database some time after the flow has ended.
    """
    body = {"flow_runs": {"id": {"any_": [last_flow_run(environment)["id"]]}}, "limit": 100}
    until = time.monotonic() + 90
    while True:
        rows = {row["name"]: row for row in query(environment, "task_runs", body)}
        # A task that waits for a failed task stays pending for ever.
        running = [name for name, row in rows.items() if row["state_type"] == "RUNNING"]
        if (len(rows) >= expected and not running) or time.monotonic() > until:
            return rows
        time.sleep(0.5)


def artifacts(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Artifacts on the page of the last flow run, by key."""
    flow_run = {"flow_run_id": {"any_": [last_flow_run(environment)["id"]]}}
    return {row["key"]: row for row in query(environment, "artifacts", {"artifacts": flow_run})}


def log_lines(environment: dict[str, str]) -> list[str]:
    """Log messages of the last flow run, in order."""
    flow_run = {"flow_run_id": {"any_": [last_flow_run(environment)["id"]]}}
    lines = query(environment, "logs", {"logs": flow_run, "sort": "TIMESTAMP_ASC"})
    return [line["message"] for line in lines]


def start(environment: dict[str, str], job: str) -> forked.Program:
    """Start `glmbatch run JOB` in a process that begins with its imports done."""
    return forked.start(environment, "-m", "glmbatch.cli.main", "run", job)


def start_new(environment: dict[str, str], job: str) -> subprocess.Popen[bytes]:
    """Start `glmbatch run JOB` in a new Python."""
    command = [sys.executable, "-m", "glmbatch.cli.main", "run", job]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        command, env={**os.environ, **environment}, cwd=ROOT, start_new_session=True, **quiet
    )  # type: ignore[call-overload,no-any-return]


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of the output, sorted by text."""
    return sorted(rows_of(out), key=lambda row: str(row["text"]))
