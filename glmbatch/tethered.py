"""A module run as a program that ends with the process that started it, however that one ends.

    python -m glmbatch.tethered MODULE ARGUMENT...

Standard input is a pipe whose other end the starting process holds open. The system closes it with
that process, after kill -9 too, on any system.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

# A server closes its database first; torchrun waits so long for its own processes.
GRACE_SECONDS = 40


def _end_with_standard_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_standard_input, name="tether", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
