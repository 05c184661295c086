"""Prefect on one machine, in the background: a server with its UI, the deployments, and a worker that runs them.

    python -m deployments.local up|down|status          (`make up`, `make down`)
    python -m deployments.local deploy                  the deployments alone, on the server at PREFECT_API_URL

All of it on loopback and in PREFECT_HOME (.prefect), on port PREFECT_SERVER_API_PORT (4200). Each process is known by
what its environment says of it, which its own processes inherit: a run whose worker was killed is still found.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from glmbatch.cli.server import LOOPBACK, api_address, is_ready, start, stop, wait_until_ready
from glmbatch.errors import GlmbatchError, InputError, TransientError

ROOT = Path(__file__).resolve().parent.parent
POOL = "glmbatch"
DEPLOYMENTS = ROOT / "deployments" / "prefect.yaml"
SILENT_RUNS = ROOT / "deployments" / "silent_runs.yaml"
GRACE_SECONDS = 30

# Where the user has set nothing else.
DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the least that Prefect takes
    "PREFECT_WORKER_QUERY_SECONDS": "5",
    # Else a server that comes back after more than a minute has forgotten which runs were to give a sign of life.
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D",
}


@dataclass(frozen=True)
class Local:
    """The server and the worker of one PREFECT_HOME."""

    home: Path
    port: int

    @property
    def ui(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process, and for a shell that is to speak to the server."""
        ours = {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": api_address(self.port),
            "GLMBATCH_HOME": str(ROOT),
        }
        return {**DEFAULTS, **os.environ, **ours}

    def up(self) -> None:
        """Start what does not run yet, and put the deployments on the server as they are in the file now."""
        self._start_server()
        deploy(self.environment)
        if not self.leader("worker"):
            self._start(
                "worker",
                "worker",
                "start",
                "--pool",
                POOL,
                "--type",
                "process",
                "--install-policy",
                "never",
            )

    def down(self) -> None:
        """Stop the worker with its runs, then the server. After the next `up` the watch finds the runs."""
        for name in ("worker", "server"):
            leader = self.leader(name)
            if leader:
                stop([leader], GRACE_SECONDS)  # which stops what it started
            stop(self.processes(name))

    def leader(self, name: str) -> psutil.Process | None:
        """The process that `up` started as the server or the worker, if it lives."""
        for process in self.processes(name):
            with suppress(psutil.Error):  # it may end at any moment
                if name in process.cmdline():
                    return process
        return None

    def processes(self, name: str) -> list[psutil.Process]:
        """The living processes of the server or the worker, its runs among them."""
        return [process for process in psutil.process_iter() if self._is(name, process)]

    def log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def _start_server(self) -> None:
        address = api_address(self.port)
        if self.leader("server"):
            if not is_ready(address):
                raise InputError(
                    f"{self.log('server')}: the server runs and does not answer at {address}. Run make down first."
                )
            return
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, self.port))
            except OSError as error:
                seen = f"{LOOPBACK}:{self.port}: cannot be used: {error.strerror}"
                raise InputError(f"{seen}. Set PREFECT_SERVER_API_PORT to a free port.") from error
        server = self._start(
            "server", "server", "start", "--host", LOOPBACK, "--port", str(self.port)
        )
        wait_until_ready(address, server, f"See {self.log('server')}.")

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            return start(
                *command, log=log, environment={**self.environment, "GLMBATCH_PROCESS": name}
            )

    def _is(self, name: str, process: psutil.Process) -> bool:
        try:
            said = process.environ()
        except psutil.Error:  # gone, or another user's
            return False
        return said.get("GLMBATCH_PROCESS") == name and said.get("PREFECT_HOME") == str(self.home)


def deploy(environment: Mapping[str, str]) -> None:
    """Put the work pool, the deployments with their triggers, and the watch for silent runs on PREFECT_API_URL."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.events.schemas.automations import AutomationCore
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.settings import PREFECT_API_URL, temporary_settings

    watch = AutomationCore.model_validate(yaml.safe_load(SILENT_RUNS.read_text(encoding="utf-8")))
    server = {PREFECT_API_URL: environment["PREFECT_API_URL"]}
    with temporary_settings(server), get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        # Never changed afterwards: it would forget which runs it has heard of, and what a person set in the UI.
        if not client.read_automations_by_name(watch.name):
            client.create_automation(watch)
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        str(DEPLOYMENTS),
    ]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise TransientError(
            f"{DEPLOYMENTS}: not deployed: {' '.join((done.stdout + done.stderr).split())}"
        )


def local() -> Local:
    """As the environment says."""
    port = os.environ.get("PREFECT_SERVER_API_PORT", "4200")
    if not port.isdigit():
        raise InputError(f"PREFECT_SERVER_API_PORT: is no port: {port!r}.")
    return Local(Path(os.environ.get("PREFECT_HOME", ROOT / ".prefect")).resolve(), int(port))


def describe(here: Local) -> str:
    """What runs, where to look, and what to do next."""
    lines = []
    for name in ("server", "worker"):
        found = here.leader(name)
        lines.append(
            f"{name}: {f'runs as process {found.pid}' if found else 'does not run'}; log: {here.log(name)}"
        )
    if is_ready(api_address(here.port)):
        lines += [
            f"UI: {here.ui} (Deployments, a name, Run: with other settings in its form)",
            f"in a shell: export PREFECT_API_URL={api_address(here.port)}",
            "            .venv/bin/prefect deployment run annotate/nightly",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    try:
        match arguments:
            case ["deploy"]:
                if "PREFECT_API_URL" not in os.environ:
                    raise InputError(
                        "PREFECT_API_URL: is not set. Set it to the API of the server to deploy to."
                    )
                deploy({"GLMBATCH_HOME": str(ROOT), **os.environ})
                return 0
            case ["up"]:
                local().up()
            case ["down"]:
                local().down()
            case ["status"]:
                pass
            case _:
                raise InputError("usage: python -m deployments.local up|down|status|deploy")
        print(describe(local()))
    except GlmbatchError as error:
        print(f"glmbatch: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
