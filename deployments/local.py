"""Prefect on one machine, in the background: a server with its UI, the deployments, and a worker.

    python -m deployments.local up|down|status     (`make up`, `make down`)
    python -m deployments.local deploy             the deployments alone, on PREFECT_API_URL

Everything listens on loopback, on port PREFECT_SERVER_API_PORT (4200), and writes to PREFECT_HOME
(.prefect). Processes are found by their environment, which their children inherit. So a run is
found even after the worker that started it was killed, which a stored process id cannot do.
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
# A worker that is asked to end stops its runs first, and waits for them.
GRACE_SECONDS = 30

# Each applies only where the user's environment has no value of its own.
DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; Prefect accepts no less
    "PREFECT_WORKER_QUERY_SECONDS": "5",
    # By default a server that was down for over a minute forgets which runs owe it a heartbeat.
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D",
}


@dataclass(frozen=True)
class Local:
    """The server and the worker of one PREFECT_HOME."""

    home: Path
    port: int

    @property
    def ui(self) -> str:
        """The address of the UI."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables of every process here, and of a shell that talks to the server."""
        ours = {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": api_address(self.port),
            "GLMBATCH_HOME": str(ROOT),
        }
        return {**DEFAULTS, **os.environ, **ours}

    def up(self) -> None:
        """Start what is not running, and update the deployments from prefect.yaml.

        Raises InputError if the port is taken, TransientError if the server does not start.
        """
        self._start_server()
        deploy(self.environment)
        if self.leader("worker") is None:
            pool = ("--pool", POOL, "--type", "process", "--install-policy", "never")
            self._start("worker", "worker", "start", *pool)

    def down(self) -> None:
        """Stop the worker with its runs, then the server.

        Runs that were cut off are still "running" in the database. After the next `up` the
        heartbeat automation marks them as crashed.
        """
        for name in ("worker", "server"):
            leader = self.leader(name)
            if leader is not None:
                # Alone at first: it stops its own children in order.
                stop([leader], GRACE_SECONDS)
            stop(self.processes(name))

    def leader(self, name: str) -> psutil.Process | None:
        """The living process that `up` started as "server" or "worker"; None without one."""
        for process in self.processes(name):
            with suppress(psutil.Error):  # it may end at any moment
                # Its children have the same environment, but other commands.
                if name in process.cmdline():
                    return process
        return None

    def processes(self, name: str) -> list[psutil.Process]:
        """The living processes of the "server" or the "worker", with the worker's runs."""
        return [process for process in psutil.process_iter() if self._is(name, process)]

    def log(self, name: str) -> Path:
        """The file that the "server" or the "worker" logs to."""
        return self.home / f"{name}.log"

    def _start_server(self) -> None:
        address = api_address(self.port)
        if self.leader("server") is not None:
            if not is_ready(address):
                raise InputError(
                    f"{self.log('server')}: the server is running but does not answer at "
                    f"{address}. Run make down first."
                )
            return
        self._check_port()
        place = ("--host", LOOPBACK, "--port", str(self.port))
        server = self._start("server", "server", "start", *place)
        wait_until_ready(address, server, f"See {self.log('server')}.")

    def _check_port(self) -> None:
        """Raise InputError if something else listens on the port: Prefect would only log it."""
        with socket.socket() as probe:
            # As the server does: else a port is taken for a minute after its last connection.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, self.port))
            except OSError as error:
                raise InputError(
                    f"{LOOPBACK}:{self.port}: cannot be used: {error.strerror}. "
                    "Set PREFECT_SERVER_API_PORT to a free port."
                ) from error

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        self.home.mkdir(parents=True, exist_ok=True)
        environment = {**self.environment, "GLMBATCH_PROCESS": name}
        with self.log(name).open("ab") as log:
            return start(*command, log=log, environment=environment)

    def _is(self, name: str, process: psutil.Process) -> bool:
        try:
            environment = process.environ()
        except psutil.Error:  # it ended, or belongs to another user
            return False
        return (
            environment.get("GLMBATCH_PROCESS") == name
            # Another checkout has a PREFECT_HOME, a server and a worker of its own.
            and environment.get("PREFECT_HOME") == str(self.home)
        )


def local() -> Local:
    """The server and worker that the environment names; InputError for a port that is none."""
    port = os.environ.get("PREFECT_SERVER_API_PORT", "4200")
    if not port.isdigit():
        raise InputError(f"PREFECT_SERVER_API_PORT: must be a port number, not {port!r}.")
    home = Path(os.environ.get("PREFECT_HOME", ROOT / ".prefect"))
    return Local(home.resolve(), int(port))


def deploy(environment: Mapping[str, str]) -> None:
    """Put the work pool, the heartbeat automation and the deployments on PREFECT_API_URL.

    `environment` names the server. Safe to repeat. Raises TransientError if Prefect refuses.
    """
    _create_pool_and_watch(environment["PREFECT_API_URL"])
    # Prefect reads prefect.yaml in its command alone, not in a function that we could call.
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    command += ["--prefect-file", str(DEPLOYMENTS)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        output = " ".join((done.stdout + done.stderr).split())
        raise TransientError(f"{DEPLOYMENTS}: not deployed: {output}")


def _create_pool_and_watch(address: str) -> None:
    """Create the work pool and the heartbeat automation, unless the server has them."""
    # Loading Prefect takes seconds, which `status` and `down` save.
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.events.schemas.automations import AutomationCore
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.settings import PREFECT_API_URL, temporary_settings

    watch = AutomationCore.model_validate(yaml.safe_load(SILENT_RUNS.read_text(encoding="utf-8")))
    with temporary_settings({PREFECT_API_URL: address}), get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        # Never updated: an update drops the runs it tracks, and what a person changed in the UI.
        if not client.read_automations_by_name(watch.name):
            client.create_automation(watch)


def describe(services: Local) -> str:
    """What is running, where to look, and what to do next."""
    lines = []
    for name in ("server", "worker"):
        leader = services.leader(name)
        state = f"running as process {leader.pid}" if leader else "not running"
        lines.append(f"{name}: {state}; log: {services.log(name)}")
    address = api_address(services.port)
    if is_ready(address):
        lines += [
            f"UI: {services.ui} (Deployments, a name, Run: with other settings in its form)",
            f"in a shell: export PREFECT_API_URL={address}",
            "            .venv/bin/prefect deployment run annotate/nightly",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run one command; return the exit code: 0 done, 1 failed, 2 usage."""
    try:
        match arguments:
            case ["up"]:
                local().up()
            case ["down"]:
                local().down()
            case ["status"]:
                pass
            case ["deploy"]:
                if "PREFECT_API_URL" not in os.environ:
                    raise InputError(
                        "PREFECT_API_URL: is not set. Set it to the API of the server to deploy to."
                    )
                # GLMBATCH_HOME: where the workers of that server have the checkout.
                deploy({"GLMBATCH_HOME": str(ROOT), **os.environ})
                return 0
            case _:
                raise InputError("usage: python -m deployments.local up|down|status|deploy")
        print(describe(local()))
    except GlmbatchError as error:
        print(f"glmbatch: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
