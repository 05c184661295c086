"""The engines of this process: loaded once, shared by threads and runs, closed for room."""

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
    """Who leases an engine: a run, which may be told to stop while others go on."""

    def check_running(self) -> None:
        """Raise when the owner was told to stop."""


class EnginePool:
    """Loads an engine at its first use and keeps it for the next. Safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._engines: OrderedDict[Hashable, Engine] = OrderedDict()
        # Leases of each engine by owner; an engine may be closed while it is leased.
        self._leases: dict[Hashable, Counter[Owner]] = {}

    @contextmanager
    def lease(
        self, key: Hashable, load: Callable[[], Engine], most: int, owner: Owner
    ) -> Iterator[Engine]:
        """The engine under `key` for `owner`, loaded by `load` when it is not there yet.

        At most `most` engines stay loaded: the one unused for longest is closed first, and while
        all are in use the caller waits. Raises what `owner.check_running` raises.
        """
        engine = self._take(key, load, most, owner)
        try:
            yield engine
        finally:
            with self._changed:
                # Without the owners of no lease, whose memory would stay with their names.
                self._leases[key] -= Counter([owner])
                self._changed.notify_all()

    def _take(self, key: Hashable, load: Callable[[], Engine], most: int, owner: Owner) -> Engine:
        with self._changed:
            owner.check_running()
            while key not in self._engines:
                if len(self._engines) < most:
                    # Loaded under the lock, so that a second thread waits instead of loading it
                    # too.
                    self._engines[key] = load()
                elif not self._close_idle():
                    self._changed.wait()
                owner.check_running()
            self._engines.move_to_end(key)
            self._leases.setdefault(key, Counter())[owner] += 1
            return self._engines[key]

    def _close_idle(self) -> bool:
        """Close the engine that has been unused for longest; false when all are in use."""
        for key in self._engines:
            if not self._owners(key):
                logger.info("closing an engine to make room for another")
                self._engines.pop(key).close()
                return True
        return False

    def _owners(self, key: Hashable) -> list[Owner]:
        return list(self._leases.get(key, ()))

    def discard(self, engine: Engine) -> None:
        """Close `engine`, so that its next use loads it again; nothing when it is no longer here."""
        with self._changed:
            for key in list(self._engines):
                if self._engines[key] is engine:
                    del self._engines[key]
            self._changed.notify_all()
        engine.close()

    def close_unshared(self, owner: Owner) -> None:
        """Close the engines that `owner` alone is using, which ends its calls with a
        TransientError.

        An engine that others use too goes on; there `owner` ends its calls itself, at its next
        answer.
        """
        with self._changed:  # waits for an engine that is being loaded
            engines = [
                engine for key, engine in self._engines.items() if self._owners(key) == [owner]
            ]
            self._changed.notify_all()  # the owner may also wait for room
        for engine in engines:
            self.discard(engine)
