"""Prefect servers of our own, on loopback: one for a run when the user has none, or one that stays (`make up`)."""

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
# 7 to 49 s were seen, depending on load.
START_SECONDS = 180


@contextmanager
def own_server() -> Iterator[str]:
    """Start a server for one run, quiet and without a UI, and give the address of its API.

    TransientError when it does not come up.
    """
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    address = api_address(port)
    server = start("server", "start", "--host", LOOPBACK, "--port", str(port), "--no-ui")
    leader = psutil.Process(server.pid)
    family = [leader]
    try:
        wait_until_ready(address, server, "Set PREFECT_API_URL to use yours.")
        family += leader.children(recursive=True)  # which are there even when their leader is not
        yield address
    finally:
        with suppress(psutil.NoSuchProcess):
            family += leader.children(recursive=True)
        stop(family)
        server.wait()


def api_address(port: int) -> str:
    return f"http://{LOOPBACK}:{port}/api"


def start(
    *command: str,
    log: int | IO[bytes] = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a `prefect` command in the background, in a session of its own.

    So Ctrl-C, which a terminal sends to the whole group, reaches a run and not the server under it; the run then ends
    in order and stops the server.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "prefect", *command],
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
    """Return when the API answers; TransientError, which ends with `hint`, when it does not."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        if is_ready(address):
            return
        time.sleep(0.2)
    raise TransientError(f"{address}: the Prefect server did not start. {hint}")


def stop(processes: Sequence[psutil.Process], seconds: float = 10) -> None:
    """End the processes: asked first, then killed."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=seconds)
