"""The program of an engine process: a `TorchEngine` that answers the calls of the parent process.

    to this process      the settings; then the number of a call with its pickled requests, or with
                         None when the call ends
    to the parent        lists of pairs: the number of a call and a result or an error, or a kind of
                         news and its value

It ends when the parent ends, however that happens, and has nothing to save.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from glmbatch.errors import DeviceLost, GlmbatchError, TransientError

if TYPE_CHECKING:  # not at run time: the parent reads this module too, and loads no torch
    from glmbatch.glm.engine.worker import TorchEngine

logger = logging.getLogger(__name__)

# Requests or results in one message, at most. Pickling holds Python's lock, here for 1 ms.
BATCH = 128
# The kinds of news: the model is loaded, the engine has stopped, something was logged.
READY, STOPPED, LOGGED = "ready", "stopped", "logged"
# Another child of the parent may hold the socket open when the parent is gone.
SECONDS_BETWEEN_LOOKS = 5

Outbox = SimpleQueue[tuple[int | str, Any]]


@dataclass(slots=True)
class LoadedLimits:
    """The limits of the loaded model, against which the parent checks requests; and its arena."""

    has_head: bool
    max_positions: int
    vocab_size: int
    token_count: int
    arena_bytes: int = 0


def main(handle: int, parent: int) -> None:
    """Load an engine and serve the process `parent` through the socket `handle`; never returns."""
    connection = Connection(handle)
    outbox: Outbox = SimpleQueue()
    engines: SimpleQueue[TorchEngine] = SimpleQueue()
    settings = connection.recv()
    logging.getLogger("glmbatch").addHandler(_Telling(outbox))
    logging.getLogger("glmbatch").setLevel(logging.INFO)
    sender = threading.Thread(target=_send_all, args=(connection, outbox), daemon=True)
    sender.start()
    # Before the model loads, so that this process also ends if the parent does so now.
    threading.Thread(
        target=_receive_all, args=(connection, parent, engines, outbox), daemon=True
    ).start()
    try:
        from glmbatch.glm.engine.loading import load_here

        engine = load_here(settings)
    except Exception as error:
        if not isinstance(error, GlmbatchError):
            logger.exception("the model could not be loaded")
        outbox.put((STOPPED, _portable(error)))
    else:
        gc.freeze()  # no search for garbage need look at half a million objects of imports again
        engines.put(engine)
        model = engine.model_limits
        loaded = LoadedLimits(
            model.has_head,
            model.max_positions,
            model.vocab_size,
            model.token_count,
            engine.arena_bytes,
        )
        outbox.put((READY, loaded))
        outbox.put((STOPPED, _portable(engine.wait())))
    sender.join()
    os._exit(0)


def _send_all(connection: Connection, outbox: Outbox) -> None:
    """Send what is in `outbox`, up to the news that the engine has stopped."""
    kind: int | str = READY
    while kind != STOPPED:
        batch: list[tuple[int | str, Any]] = []
        # Behind that news there may be errors of requests that came too late.
        while kind != STOPPED and (not batch or (len(batch) < BATCH and not outbox.empty())):
            batch.append(outbox.get())
            kind = batch[-1][0]
        connection.send_bytes(pickle.dumps(batch))


def _receive_all(
    connection: Connection, parent: int, engines: SimpleQueue[TorchEngine], outbox: Outbox
) -> None:
    """Hand requests to the engine until the parent has ended; then end this process."""
    calls: dict[int, _ParentsCall] = {}
    engine = None
    try:
        while True:
            while not connection.poll(SECONDS_BETWEEN_LOOKS):
                if os.getppid() != parent:
                    return
            number, pickled = connection.recv()
            if pickled is None:
                if number in calls:
                    calls.pop(number).cancelled = True
                continue
            engine = engine or engines.get()
            call = calls.setdefault(number, _ParentsCall(number, outbox))
            _submit_all(engine, call, pickled)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _submit_all(engine: TorchEngine, call: Any, pickled: bytes) -> None:
    try:
        for request in pickle.loads(pickled):
            engine.submit(call, request)
    except Exception as error:  # noqa: BLE001 - the caller's code: raised in that caller only
        call.fail(error)


class _ParentsCall:
    """A `Call` whose caller is in the parent process."""

    def __init__(self, number: int, outbox: Outbox) -> None:
        self._number = number
        self._outbox = outbox
        self.cancelled = False

    def deliver(self, result: Any) -> None:
        """Send `result` to the caller."""
        self._outbox.put((self._number, result))

    def fail(self, error: Exception) -> None:
        """Raise `error` in the caller."""
        self.cancelled = True
        self._outbox.put((self._number, _portable(error)))


class _Telling(logging.Handler):
    """Logs in the parent process, where a run keeps its log."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record with its traceback as text."""
        self._outbox.put((LOGGED, (record.name, record.levelno, self.format(record))))


def _portable(error: Exception) -> Exception:
    """`error` as the parent raises it. A GPU that is lost for this process serves the next one."""
    if isinstance(error, DeviceLost):
        return TransientError(str(error))
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception of the caller's own, which may do anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return copy
