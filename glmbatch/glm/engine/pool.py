"""The engines of this process: loaded once, shared by threads and runs, closed to make room."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

from glmbatch.glm.engine.protocol import Engine

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """A run that leases an engine. It may be stopped while other runs continue."""

    def check_running(self) -> None:
        """Raise if the owner was stopped."""


class EnginePool:
    """Loads an engine on first use and keeps it for later. Safe to call from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._engines: OrderedDict[Hashable, Engine] = OrderedDict()
        # Leases of each engine by owner; an engine may be closed while it is leased.
        self._leases: dict[Hashable, Counter[Owner]] = {}

    @property
    def arenas_bytes(self) -> int:
        """Memory that the arenas of all engines hold."""
        with self._changed:
            return sum(engine.arena_bytes for engine in self._engines.values())

    @contextmanager
    def lease(
        self, key: Hashable, load: Callable[[], Engine], max_engines: int, owner: Owner
    ) -> Iterator[Engine]:
        """The engine under `key`, leased to `owner`; `load` creates it if it is not in the pool.

        At most `max_engines` engines stay loaded. The least recently used idle one is closed to
        make room; if all are in use, the caller waits. Raises what `load` and
        `owner.check_running` raise.
        """
        engine = self._take(key, load, max_engines, owner)
        try:
            yield engine
        finally:
            with self._changed:
                # Subtracting Counters drops owners without a lease, so none is kept in memory.
                self._leases[key] -= Counter([owner])
                self._changed.notify_all()

    def _take(
        self, key: Hashable, load: Callable[[], Engine], max_engines: int, owner: Owner
    ) -> Engine:
        with self._changed:
            owner.check_running()
            while key not in self._engines:
                if len(self._engines) < max_engines:
                    # Loaded under the lock, so that a second thread waits instead of loading too.
                    self._engines[key] = load()
                elif not self._close_idle():
                    self._changed.wait()
                owner.check_running()
            self._engines.move_to_end(key)
            self._leases.setdefault(key, Counter())[owner] += 1
            return self._engines[key]

    def _close_idle(self) -> bool:
        """Close the least recently used idle engine; returns False if all are in use."""
        for key in self._engines:
            if not self._owners(key):
                logger.info("closing an engine to make room for another")
                self._engines.pop(key).close()
                return True
        return False

    def _owners(self, key: Hashable) -> list[Owner]:
        # Each owner once, however many of its fragments are in flight.
        return list(self._leases.get(key, ()))

    def discard(self, engine: Engine) -> None:
        """Close `engine` and remove it from the pool, so that its next user loads it again."""
        with self._changed:
            for key in list(self._engines):
                if self._engines[key] is engine:
                    del self._engines[key]
            self._changed.notify_all()
        engine.close()

    def close_unshared(self, owner: Owner) -> None:
        """Close the engines that only `owner` uses; its calls then raise TransientError.

        An engine that other owners use too stays open. There, the calls of `owner` end at its next
        result, because it was stopped.
        """
        engines = []
        # The lock also waits for an engine that is being loaded.
        with self._changed:
            # All are removed first: closing takes time, and none may be leased meanwhile.
            for key in list(self._engines):
                if self._owners(key) == [owner]:
                    engines.append(self._engines.pop(key))
            self._changed.notify_all()  # the owner may also be waiting for room
        for engine in engines:
            engine.close()
