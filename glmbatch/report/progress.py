"""How far the run in this process is: counts that inference adds to and a display reads. Knows no display."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`total` and `done` count answers (rows times steps); `computed` those of them that went through a model."""

    stage: str
    total: int
    done: int
    computed: int
    seconds: float


class Progress:
    """Counts of one run; safe to add to from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.start("starting", 0)

    def start(self, stage: str, total: int) -> None:
        """Begin counting `total` answers anew."""
        with self._lock:
            self._stage, self._total, self._done, self._computed = stage, total, 0, 0
            self._began = time.monotonic()

    def add(self, done: int, *, computed: bool) -> None:
        """Count answers that are ready."""
        with self._lock:
            self._done += done
            self._computed += done if computed else 0

    def snapshot(self) -> Snapshot:
        """The counts now; `seconds` since `start`."""
        with self._lock:
            return Snapshot(
                self._stage, self._total, self._done, self._computed, time.monotonic() - self._began
            )
