"""Runs Prefect in the background on one machine: a server with its UI, a worker, the deployments.

    python -m deployments.local up|down|status     (`make up`, `make down`)
    python -m deployments.local deploy             only the deployments, on PREFECT_API_URL

The server listens only on loopback, on port PREFECT_SERVER_API_PORT (4200). Everything is stored in
PREFECT_HOME (.prefect), also the server's password. Processes are found by their environment, which
their children inherit. Unlike a stored process id, this finds a run even after its worker was
killed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import yaml

from glmbatch.cli.server import (
    LOOPBACK,
    START_SECONDS,
    accepts,
    api_address,
    is_ready,
    locked,
    new_password,
    start,
    stop,
    wait_until_ready,
)
from glmbatch.errors import GlmbatchError, InputError, TransientError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

ROOT = Path(__file__).resolve().parent.parent
POOL = "glmbatch"
DEPLOYMENTS = ROOT / "deployments" / "prefect.yaml"
SILENT_RUNS = ROOT / "deployments" / "silent_runs.yaml"
# A worker that is asked to stop first stops its runs and waits for them.
GRACE_SECONDS = 30

# Defaults that the user's environment overrides.
DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # The second UI of Prefect 3.9 loads its settings from a company's server, despite the others.
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds, Prefect's minimum
    "PREFECT_WORKER_QUERY_SECONDS": "5",
    # By default, a server that was down for over a minute forgets which runs owe a heartbeat.
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D",
}


@dataclass(frozen=True)
class Local:
    """The server and the worker of one PREFECT_HOME."""

    home: Path
    port: int

    @property
    def ui(self) -> str:
        """The URL of the UI."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the server, the worker, and a shell that uses the server."""
        password = self._password
        ours = {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": api_address(self.port),
            "PREFECT_SERVER_API_AUTH_STRING": password,
            "PREFECT_API_AUTH_STRING": password,
            "GLMBATCH_HOME": str(ROOT),
        }
        return {**DEFAULTS, **locked(self.port, password), **os.environ, **ours}

    @property
    def password_file(self) -> Path:
        """The file with the server's password; only its owner can read it."""
        return self.home / "password"

    def up(self) -> None:
        """Start what is not running, and update the deployments from prefect.yaml.

        Returns once the worker polls for runs of every deployment. Raises InputError if the port is
        in use, TransientError if the server or the worker does not start.
        """
        self._start_server()
        deploy(self.environment)
        asked_after = datetime.min.replace(tzinfo=UTC)
        if self.leader("worker") is None:
            # The server counts a killed worker as alive for a minute.
            asked_after = datetime.now(UTC)
            pool = ("--pool", POOL, "--type", "process", "--install-policy", "never")
            self._start("worker", "worker", "start", *pool)
        self._wait_for_worker(asked_after)

    def down(self) -> list[str]:
        """Stop the worker with its runs, then the server; returns what was stopped.

        Interrupted runs are still "running" in the database. After the next `up`, the heartbeat
        automation marks them as crashed.
        """
        stopped = []
        for name in ("worker", "server"):
            leader = self.leader(name)
            family = self.processes(name)
            if leader is not None:
                # The leader alone first, so that it stops its own children cleanly.
                stop([leader], GRACE_SECONDS)
                stopped.append(f"{name} (process {leader.pid})")
            elif family:
                stopped.append(f"{len(family)} leftover processes of a killed {name}")
            stop(self.processes(name))
        return stopped

    def leader(self, name: str) -> psutil.Process | None:
        """The live process that `up` started as "server" or "worker"; None if there is none."""
        for process in self.processes(name):
            with suppress(psutil.Error):  # it may end at any time
                # Its children have the same environment, but other commands.
                if name in process.cmdline():
                    return process
        return None

    def processes(self, name: str) -> list[psutil.Process]:
        """All live processes of the "server" or the "worker", including the worker's runs."""
        return [process for process in psutil.process_iter() if self._is(name, process)]

    def log(self, name: str) -> Path:
        """The log file of the "server" or the "worker"."""
        return self.home / f"{name}.log"

    @property
    def _password(self) -> str:
        """The password in the environment, or else in the file, which is created once."""
        if given := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
            return given
        if not self.password_file.exists():
            self.home.mkdir(parents=True, exist_ok=True)
            # mkstemp makes it readable only for this user; the link makes it appear complete.
            descriptor, name = tempfile.mkstemp(dir=self.home)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(new_password() + "\n")
            with suppress(FileExistsError):  # another `up` was faster
                os.link(name, self.password_file)
            os.unlink(name)
        return self.password_file.read_text(encoding="utf-8").strip()

    def _start_server(self) -> None:
        address = api_address(self.port)
        leader = self.leader("server")
        if leader is None:
            self._check_port()
            place = ("--host", LOOPBACK, "--port", str(self.port))
            server = psutil.Process(self._start("server", "server", "start", *place).pid)
            wait_until_ready(address, server, f"See {self.log('server')}.")
            return
        # A server that a killed `up` started may still be starting.
        seconds = START_SECONDS - (time.time() - leader.create_time())
        hint = f"See {self.log('server')}, and run make down first."
        wait_until_ready(address, leader, hint, seconds)
        if accepts(address, None) or not accepts(address, self._password):
            raise InputError(
                f"{address}: the running server has another password, or none. Run make down first."
            )

    def _wait_for_worker(self, asked_after: datetime) -> None:
        """Return once the worker has polled every deployment since `asked_after`.

        TransientError if it does not in START_SECONDS.
        """
        until = time.monotonic() + START_SECONDS
        with client_of(self.environment) as client:
            while time.monotonic() < until and self.leader("worker") is not None:
                if is_served(client, asked_after):
                    return
                time.sleep(0.5)
        raise TransientError(
            f"{self.ui}: the worker does not poll for runs. See {self.log('worker')}."
        )

    def _check_port(self) -> None:
        """Raise InputError if the port is in use, because Prefect would only log that."""
        with socket.socket() as probe:
            # As the server does. Otherwise a port stays in use for a minute after it is closed.
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
            # Another checkout has its own PREFECT_HOME, server and worker.
            and environment.get("PREFECT_HOME") == str(self.home)
        )


def local() -> Local:
    """The server and worker that the environment describes. InputError if its port is invalid."""
    port = os.environ.get("PREFECT_SERVER_API_PORT", "4200")
    if not port.isdigit():
        raise InputError(f"PREFECT_SERVER_API_PORT: must be a port number, not {port!r}.")
    home = Path(os.environ.get("PREFECT_HOME", ROOT / ".prefect"))
    return Local(home.resolve(), int(port))


def deploy(environment: Mapping[str, str]) -> None:
    """Create the work pool, the heartbeat automation and the deployments on a server.

    `environment` has its PREFECT_API_URL and password. Safe to repeat. Raises TransientError if
    Prefect refuses.
    """
    with client_of(environment) as client:
        _create_pool_and_watch(client)
    # Only Prefect's command reads prefect.yaml; it has no public function for that.
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    command += ["--prefect-file", str(DEPLOYMENTS)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        output = " ".join((done.stdout + done.stderr).split())
        raise TransientError(f"{DEPLOYMENTS}: the deployments were not created: {output}")


@contextmanager
def client_of(environment: Mapping[str, str]) -> Iterator[SyncPrefectClient]:
    """A client of the server in PREFECT_API_URL of `environment`, with its password if set."""
    # Imported here, because it takes seconds that `status` and `down` can save.
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    settings = {
        PREFECT_API_URL: environment["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: environment.get("PREFECT_API_AUTH_STRING"),
    }
    with temporary_settings(settings), get_client(sync_client=True) as client:
        yield client


def _create_pool_and_watch(client: SyncPrefectClient) -> None:
    """Create the work pool and the heartbeat automation if the server does not have them."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.events.schemas.automations import AutomationCore
    from prefect.exceptions import ObjectAlreadyExists

    watch = AutomationCore.model_validate(yaml.safe_load(SILENT_RUNS.read_text(encoding="utf-8")))
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    # Never updated: an update would drop the runs it tracks and all changes made in the UI.
    if not client.read_automations_by_name(watch.name):
        client.create_automation(watch)


def is_served(client: SyncPrefectClient, asked_after: datetime) -> bool:
    """Whether a worker has polled every deployment of the pool since `asked_after`."""
    from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName

    ours = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    for deployment in client.read_deployments(work_pool_filter=ours):
        polled = deployment.last_polled
        if deployment.status != "READY" or polled is None or polled < asked_after:
            return False
    return True


def describe(services: Local) -> str:
    """What is running, where its logs and UI are, and how to use it from a shell."""
    lines = []
    for name in ("server", "worker"):
        leader = services.leader(name)
        state = f"running as process {leader.pid}" if leader else "not running"
        lines.append(f"{name}: {state}; log: {services.log(name)}")
    address = api_address(services.port)
    if is_ready(address):
        password = f'"$(cat {services.password_file})"'
        lines += [
            f"UI: {services.ui} (choose one under Deployments; Run shows a form with its settings)",
            f"password: the line in {services.password_file}; the UI asks for it once",
            f"in a shell: export PREFECT_API_URL={address}",
            f"            export PREFECT_API_AUTH_STRING={password}",
            "            .venv/bin/prefect deployment run annotate/nightly",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 usage or bad input."""
    try:
        match arguments:
            case ["up"]:
                local().up()
            case ["down"]:
                stopped = local().down()
                print("stopped: " + ", ".join(stopped or ["nothing was running"]))
                return 0
            case ["status"]:
                pass
            case ["deploy"]:
                if "PREFECT_API_URL" not in os.environ:
                    raise InputError(
                        "PREFECT_API_URL: is not set. Set it to the API of the server to deploy to."
                    )
                # GLMBATCH_HOME is the path of the checkout on that server's workers.
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
