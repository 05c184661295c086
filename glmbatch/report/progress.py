"""Progress counts of a run in this process: inference adds, a display reads. Knows no display."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counts at one moment, in answers (rows times steps), or in `unit`.

    `computed` is the part of `done` that the model answered; `seconds` is the time since the stage
    began. `note` is another number to show, as name=value.
    """

    stage: str
    total: int
    done: int
    computed: int
    seconds: float
    unit: str = "answers"
    note: str = ""

    @property
    def per_second(self) -> float:
        """Answers per second from the model; 0.0 if no time has passed."""
        return self.computed / self.seconds if self.seconds else 0.0


class Progress:
    """The counts of one run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.start("starting", 0)

    def start(self, stage: str, total: int) -> None:
        """Begin a stage with `total` answers, and set the counts to 0."""
        with self._lock:
            self._stage = stage
            self._total = total
            self._done = 0
            self._computed = 0
            # Monotonic, because an adjusted clock would make the rate jump.
            self._began = time.monotonic()

    def add(self, done: int, *, computed: bool) -> None:
        """Count `done` more answers; `computed` says whether the model answered them."""
        with self._lock:
            self._done += done
            # Reused answers took no model time, so the rate excludes them.
            self._computed += done if computed else 0

    def snapshot(self) -> Snapshot:
        """The current counts."""
        with self._lock:
            seconds = time.monotonic() - self._began
            return Snapshot(self._stage, self._total, self._done, self._computed, seconds)
