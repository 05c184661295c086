"""The engines of this process: each is loaded once, shared by all threads, and closed to make room."""

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
    """Loads an engine on first use and keeps it for the next. Safe to call from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._engines: OrderedDict[Hashable, Engine] = OrderedDict()  # least recently used first
        self._users: dict[Hashable, int] = {}
        self._stopped = False

    @contextmanager
    def lease(self, key: Hashable, load: Callable[[], Engine], most: int) -> Iterator[Engine]:
        """The engine under `key`, which `load` makes if it is not in the pool yet.

        At most `most` engines stay loaded. The least recently used idle one is closed to make room;
        while all are in use, the caller waits. Interrupted when the pool is stopped.
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
                    # Loaded under the lock, so that a second thread waits instead of loading it too.
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
        """Raise Interrupted if the pool was stopped."""
        if self._stopped:
            raise Interrupted("the run was told to stop")

    def resume(self) -> None:
        """Allow engines to be used again."""
        self._stopped = False

    def stop(self) -> None:
        """Refuse new leases and end the running ones. Returns at once."""
        self._stopped = True
        # Closing waits for the current forward, and for an engine that is being loaded.
        threading.Thread(target=self.close, name="stop-engines", daemon=True).start()

    def discard(self, engine: Engine) -> None:
        """Close `engine` and remove it, so that its next user loads it again."""
        with self._changed:
            keys = [key for key, other in self._engines.items() if other is engine]
            for key in keys:
                del self._engines[key]
            self._changed.notify_all()
        engine.close()

    def close(self) -> None:
        """Close every engine. Callers that wait for a result get a TransientError."""
        with self._changed:  # an engine that is being loaded holds the lock until it is here
            engines = list(self._engines.values())
        for engine in engines:
            self.discard(engine)


POOL = EnginePool()
