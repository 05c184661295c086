"""A `prefect` command that ends with the process that started it, however that one ends.

    python -m glmbatch.cli.tethered server start ...

Standard input is a pipe whose other end the starting process holds open. The system closes it with
that process, after kill -9 too, on any system. No Prefect is imported here: it is run as a module.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

# A server that is told to end closes its database first.
GRACE_SECONDS = 10


def _end_with_standard_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_standard_input, name="tether", daemon=True).start()
    sys.argv[0] = "prefect"
    runpy.run_module("prefect", run_name="__main__")
