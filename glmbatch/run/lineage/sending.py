"""Sends events through openlineage-python, on a thread of its own. Knows no run.

A server that is down or slow costs a run one warning and a few seconds at its end.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from glmbatch.errors import InputError
from glmbatch.settings.report import LineageConfig

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

logger = logging.getLogger(__name__)

Made = TypeVar("Made")
REQUEST_SECONDS = 3.0  # to connect, and for each part of an answer
END_SECONDS = 7.0  # how long the end of a run waits for its events


class Sender:
    """Sends the events of one run in their order; `close` waits for them."""

    def __init__(self, config: LineageConfig) -> None:
        """InputError when openlineage-python is missing."""
        self._where = config.url or config.file
        self._client = _client(config)
        self._warned = False
        self._waiting: SimpleQueue[Callable[[], RunEvent] | None] = SimpleQueue()
        # A daemon, because a server may keep it longer than the run.
        self._thread = threading.Thread(target=self._send_all, name="lineage", daemon=True)
        self._thread.start()

    def send(self, make: Callable[[], RunEvent]) -> None:
        """Send what `make` returns, which is called on the thread: it may read files."""
        self._waiting.put(make)

    def made(self, make: Callable[[], Made]) -> Made | None:
        """What `make` returns now; None, with a warning, if it fails."""
        try:
            return make()
        except Exception as error:  # noqa: BLE001 - whatever happens here must fail no run
            self._warn(f"{type(error).__name__}: {error}")
            return None

    def close(self) -> None:
        """Wait until all events are sent, or END_SECONDS."""
        self._waiting.put(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._warn(f"no answer in {END_SECONDS:.0f} s")

    def _send_all(self) -> None:
        while (make := self._waiting.get()) is not None:
            self.made(partial(self._emit, make))

    def _emit(self, make: Callable[[], RunEvent]) -> None:
        self._client.emit(make())

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: the lineage of this run is not complete there: %s",
                self._where,
                " ".join(reason.split()),
            )


def _client(config: LineageConfig) -> Any:
    try:
        from openlineage.client import OpenLineageClient
    except ImportError as error:
        raise InputError(
            "lineage: openlineage-python is not installed. Run pip install 'glmbatch[lineage]'."
        ) from error
    transport: dict[str, Any] = {"type": "file", "log_file_path": config.file, "append": True}
    if config.url is not None:
        retry = {"total": 0, "read": 0, "connect": 0}
        transport = {"type": "http", "url": config.url, "timeout": REQUEST_SECONDS, "retry": retry}
        if key := os.environ.get("OPENLINEAGE_API_KEY"):
            transport["auth"] = {"type": "api_key", "apiKey": key}
    return OpenLineageClient(config={"transport": transport})
