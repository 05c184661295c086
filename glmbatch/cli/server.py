"""Prefect servers on loopback: one for a single run, or one that stays up (`make up`).

No Prefect is imported here: `python -m prefect` runs in a process of its own.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

import psutil

from glmbatch.errors import TransientError

LOOPBACK = "127.0.0.1"
# A start took 7 to 49 s where it was measured, depending on load.
START_SECONDS = 180


@contextmanager
def own_server() -> Iterator[str]:
    """Run a server without a UI or logs for the time of the block; yield the address of its API.

    Raises TransientError if it does not start.
    """
    address, port = free_address()
    server = start("server", "start", "--host", LOOPBACK, "--port", str(port), "--no-ui")
    leader = psutil.Process(server.pid)
    family = [leader]
    try:
        wait_until_ready(address, server, "Set PREFECT_API_URL to use yours.")
        # Noted while the leader lives: if it is killed, its children can no longer be found.
        family += leader.children(recursive=True)
        yield address
    finally:
        with suppress(psutil.NoSuchProcess):
            family += leader.children(recursive=True)
        stop(family)
        server.wait()


def free_address() -> tuple[str, int]:
    """The API address of a server on a free port, and that port."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return api_address(port), port


def api_address(port: int) -> str:
    """The URL of the Prefect API on `port` of this machine."""
    return f"http://{LOOPBACK}:{port}/api"


def start(
    *command: str,
    log: int | IO[bytes] = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a `prefect` command in the background and return its process."""
    return subprocess.Popen(
        [sys.executable, "-m", "prefect", *command],
        # A terminal sends Ctrl-C to its whole process group. In a session of its own the server
        # outlives it, so that the run can end in order and then stop the server.
        start_new_session=True,
        stdin=subprocess.DEVNULL,
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


def wait_until_ready(address: str, server: subprocess.Popen[bytes], hint: str) -> None:
    """Return once the API answers; raise TransientError, which ends with `hint`, if it does not."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        if is_ready(address):
            return
        time.sleep(0.2)
    raise TransientError(f"{address}: the Prefect server did not start. {hint}")


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
