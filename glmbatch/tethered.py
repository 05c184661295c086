"""Runs a module as a program that ends when the process that started it ends, however that happens.

    python -m glmbatch.tethered MODULE ARGUMENT...

Standard input is a pipe, and the parent keeps its other end open. Every operating system closes it
when the parent ends, even after kill -9.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
import threading
import time

# Time for a server to close its database, and for torchrun to wait for its own processes.
GRACE_SECONDS = 40


def _end_with_standard_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    # A server's imports make half a million objects that stay; see glmbatch/cli/main.py.
    gc.set_threshold(10_000)
    threading.Thread(target=_end_with_standard_input, name="tether", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
