"""Starts Prefect servers on loopback: one for a single run, or one that stays up (`make up`).

Both answer only clients that know the password, and no pages of other origins. Prefect is not
imported here; it runs in its own process.
"""

from __future__ import annotations

import base64
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from glmbatch.errors import TransientError

LOOPBACK = "127.0.0.1"
# Measured starts took 4 to 49 s, depending on the load.
START_SECONDS = 180
# A request to a port where nobody listens yet takes a millisecond.
POLL_SECONDS = 0.05
TETHERED = "glmbatch.tethered"
# Environment variable of a run's own server, with the process id of the run.
RUN_PROCESS = "GLMBATCH_RUN_PROCESS"


@contextmanager
def own_server() -> Iterator[dict[str, str]]:
    """Run a server without UI and logs during the block; yield the variables that a client needs.

    As `starting_server`, but the block begins when the server answers.
    """
    with starting_server() as server:
        server.wait()
        yield server.client


@contextmanager
def starting_server() -> Iterator[StartingServer]:
    """Start a server without UI and logs that runs during the block; does not wait for it.

    The server ends with this process, even if that is killed. Leftover servers of killed runs are
    stopped first.
    """
    end_leftovers()
    address, port = free_address()
    password = new_password()
    process = start(
        *("server", "start", "--host", LOOPBACK, "--port", str(port), "--no-ui"),
        tethered=True,
        environment={**os.environ, **locked(port, password), RUN_PROCESS: str(os.getpid())},
    )
    server = StartingServer(address, password, psutil.Process(process.pid))
    try:
        yield server
    finally:
        server.stop()
        process.communicate()


class StartingServer:
    """A server that may not answer yet; `client` has the variables that a client needs."""

    def __init__(self, address: str, password: str, leader: psutil.Process) -> None:
        self.client = {"PREFECT_API_URL": address, "PREFECT_API_AUTH_STRING": password}
        self._leader = leader
        self._family = [leader]
        self._is_ready = False

    def wait(self) -> None:
        """Return when the server answers; TransientError if it does not start."""
        address = self.client["PREFECT_API_URL"]
        wait_until_ready(address, self._leader, "Set PREFECT_API_URL to use your own server.")
        self._is_ready = True
        # Listed while the leader lives: after it is killed, its children cannot be found.
        self._family += self._leader.children(recursive=True)

    def stop(self) -> None:
        """End the server; at once if it is still starting, since it has nothing to finish."""
        with suppress(psutil.NoSuchProcess):
            self._family += self._leader.children(recursive=True)
        # A server that migrates its database would first complete that, for seconds.
        stop(self._family, seconds=10 if self._is_ready else 0)


def end_leftovers() -> None:
    """Stop this user's servers of killed runs. Servers of live runs and all others stay."""
    for process in psutil.process_iter():
        if _is_leftover(process):
            with suppress(psutil.NoSuchProcess):
                stop([process, *process.children(recursive=True)])


def _is_leftover(process: psutil.Process) -> bool:
    try:
        if TETHERED not in process.cmdline() or process.uids().real != os.getuid():
            return False
        # When its parent dies, a process gets another one for good.
        orphan = process.environ().get(RUN_PROCESS, str(process.ppid())) != str(process.ppid())
        # Inside a container, the parent has a different process id than the one we see.
        numbers = Path(f"/proc/{process.pid}/ns/pid")  # only on Linux
        return orphan and (not numbers.exists() or numbers.samefile("/proc/self/ns/pid"))
    except (psutil.Error, OSError):  # it ended, or belongs to another user
        return False


def new_password() -> str:
    """A new random password in Prefect's form, `user:password`."""
    return f"glmbatch:{secrets.token_urlsafe(24)}"


def locked(port: int, password: str) -> dict[str, str]:
    """The environment of a server on `port` that only clients with `password` can use.

    Without these variables, any web page open on this machine can read and start runs, because its
    scripts can reach loopback. The password also stops DNS rebinding, and web sockets, for which
    the origin is not checked.
    """
    pages = f"http://{LOOPBACK}:{port},http://localhost:{port}"
    return {
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": pages,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }


def free_address() -> tuple[str, int]:
    """The API address for a server on a free port, and the port."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return api_address(port), port


def api_address(port: int) -> str:
    """The URL of the Prefect API on `port` of loopback."""
    return f"http://{LOOPBACK}:{port}/api"


def start(
    *command: str,
    environment: Mapping[str, str],
    tethered: bool = False,
    log: int | IO[bytes] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a `prefect` command in the background and return its process.

    If `tethered`, it ends when this process ends or closes the returned process's `stdin`.
    """
    module = [TETHERED, "prefect"] if tethered else ["prefect"]
    return subprocess.Popen(
        [sys.executable, "-m", *module, *command],
        # A terminal sends Ctrl-C to its whole process group. In its own session, the server
        # survives it, so that the run can finish cleanly and then stop the server.
        start_new_session=True,
        stdin=subprocess.PIPE if tethered else subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
    )


def is_ready(address: str) -> bool:
    """Whether a Prefect API answers at `address`."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def accepts(address: str, password: str | None) -> bool:
    """Whether the Prefect API at `address` accepts a client with `password`.

    TransientError if it does not answer.
    """
    request = urllib.request.Request(f"{address}/admin/version")
    if password is not None:
        credentials = base64.b64encode(password.encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.HTTPError as error:
        return error.code != 401
    except OSError as error:
        raise TransientError(
            f"{address}: the Prefect server does not answer. Try again later."
        ) from error


def wait_until_ready(
    address: str, server: psutil.Process, hint: str, seconds: float = START_SECONDS
) -> None:
    """Return as soon as the API answers.

    TransientError, with a message that ends in `hint`, if `server` ends or `seconds` pass first.
    """
    until = time.monotonic() + seconds
    while not is_ready(address):
        if time.monotonic() > until or not _lives(server):
            raise TransientError(f"{address}: the Prefect server did not start. {hint}")
        time.sleep(POLL_SECONDS)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def stop(processes: Sequence[psutil.Process], seconds: float = 10) -> None:
    """Terminate the processes, and kill those still alive after `seconds`."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=seconds)
