"""A Prefect server for one run, when the user has none: on loopback, quiet, gone with the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from glmbatch.errors import TransientError

# 7 to 49 s were seen, depending on load.
START_SECONDS = 180


@contextmanager
def own_server() -> Iterator[str]:
    """Start a server and give the address of its API. TransientError when it does not come up.

    In a session of its own, so that Ctrl-C, which a terminal sends to the whole group, reaches the run and not the
    server under it; the run then ends in order and stops the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/api"
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-ui",
    ]
    server = subprocess.Popen(
        command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_until_ready(address, server)
        yield address
    finally:
        _stop(server)


def is_ready(address: str) -> bool:
    """Whether a Prefect API answers at `address`."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _wait_until_ready(address: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        if is_ready(address):
            return
        time.sleep(0.2)
    raise TransientError(f"{address}: the Prefect server of this run did not start. Set PREFECT_API_URL to use yours.")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its own processes: asked first, then killed."""
    for signal_number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(server.pid, signal_number)
            server.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
