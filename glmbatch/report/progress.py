"""How far the run in this process is: inference counts here, a display reads. Knows no display."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`total` and `done` count answers, which are rows times steps.

    `computed` is how many of those done went through a model.
    """

    stage: str
    total: int
    done: int
    computed: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Answers per second through the model; 0.0 before the first moment."""
        return self.computed / self.seconds if self.seconds else 0.0


class Progress:
    """Counts of one run; safe to add to from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.start("starting", 0)

    def start(self, stage: str, total: int) -> None:
        """Begin a stage with `total` answers; the counts start at 0."""
        with self._lock:
            self._stage = stage
            self._total = total
            self._done = 0
            self._computed = 0
            # Not the time of day: a clock that is set would make the rate jump.
            self._began = time.monotonic()

    def add(self, done: int, *, computed: bool) -> None:
        """Count answers that are ready."""
        with self._lock:
            self._done += done
            # Answers found on disk cost no model time, so the rate leaves them out.
            self._computed += done if computed else 0

    def snapshot(self) -> Snapshot:
        """The counts now; `seconds` since `start`."""
        with self._lock:
            seconds = time.monotonic() - self._began
            return Snapshot(self._stage, self._total, self._done, self._computed, seconds)
