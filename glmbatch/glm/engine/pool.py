"""The engines loaded in this process: each once, shared by all threads, given up when room is needed."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from glmbatch.errors import Interrupted
from glmbatch.glm.engine.protocol import Engine

logger = logging.getLogger(__name__)


class EnginePool:
    """Loads an engine at its first use and keeps it for the next; safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._engines: OrderedDict[Hashable, Engine] = OrderedDict()
        self._users: dict[Hashable, int] = {}
        self._stopped = False

    @contextmanager
    def lease(self, key: Hashable, load: Callable[[], Engine], most: int) -> Iterator[Engine]:
        """The engine under `key`, loaded by `load` when it is not there yet.

        At most `most` engines stay loaded: the one unused for longest is closed first, and while all are in use the
        caller waits.
        """
        engine = self._take(key, load, most)
        try:
            yield engine
        finally:
            with self._changed:
                self._users[key] -= 1
                self._changed.notify_all()

    def _take(self, key: Hashable, load: Callable[[], Engine], most: int) -> Engine:
        with self._changed:
            while key not in self._engines:
                self.check_running()
                idle = [other for other in self._engines if not self._users.get(other)]
                if len(self._engines) < most:
                    # Under the lock, so that a second thread that wants the same engine waits instead of loading it.
                    self._engines[key] = load()
                    self.check_running()
                elif idle:
                    logger.info("closing an engine to make room for another")
                    self._engines.pop(idle[0]).close()
                else:
                    self._changed.wait()
            self._engines.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            return self._engines[key]

    def check_running(self) -> None:
        """Raise Interrupted once the pool was told to stop."""
        if self._stopped:
            raise Interrupted("the run was told to stop")

    def resume(self) -> None:
        """Let engines be used again."""
        self._stopped = False

    def stop(self) -> None:
        """Let nobody begin, and end what is under way; returns at once."""
        self._stopped = True
        threading.Thread(target=self.close, name="stop-engines", daemon=True).start()

    def discard(self, engine: Engine) -> None:
        """Close `engine`, so that its next use loads it anew; nothing when it is no longer here."""
        with self._changed:
            for key in [key for key, other in self._engines.items() if other is engine]:
                del self._engines[key]
            self._changed.notify_all()
        engine.close()

    def close(self) -> None:
        """Close every engine; whoever waits for an answer gets a TransientError."""
        with self._changed:  # waits for one that is being loaded
            engines = list(self._engines.values())
        for engine in engines:
            self.discard(engine)


POOL = EnginePool()
