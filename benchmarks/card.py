"""How busy the GPU is and how much of its memory is used, as its driver says about all processes.

A thread reads `nvidia-smi`, so nothing is added to the contestant's own process.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time

QUERY = "--query-gpu=utilization.gpu,memory.used"
EVERY_MS = 100


class Card:
    """Readings of the first GPU from construction until `stop`; none without `nvidia-smi`."""

    def __init__(self) -> None:
        self._readings: list[tuple[float, float, float]] = []
        self._process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi") is None:
            return
        command = ["nvidia-smi", QUERY, "--format=csv,noheader,nounits", "--id=0"]
        self._process = subprocess.Popen(
            [*command, f"--loop-ms={EVERY_MS}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def between(self, start: float, end: float) -> dict[str, float]:
        """Share of the time with a kernel running, and the peak of memory in GiB.

        `start` and `end` are of `time.perf_counter`. Empty without readings.
        """
        inside = [reading for reading in self._readings if start <= reading[0] <= end]
        if not inside:
            return {}
        return {
            "busy": sum(busy for _, busy, _ in inside) / len(inside) / 100,
            "card_gib": max(mib for _, _, mib in inside) / 1024,
        }

    def stop(self) -> None:
        """End the readings."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            busy, _, mib = line.partition(",")
            try:
                self._readings.append((time.perf_counter(), float(busy), float(mib)))
            except ValueError:  # "[N/A]" on cards that do not tell
                return
