"""An engine in a process of its own: token ids in, scores and token ids out over a socket.

    callers --requests--> reader --> TorchEngine --> sender --results--> receiver --> callers
                          '------- engine process --------'

The threads of one process take turns at running Python, so rows, files and Prefect would keep the
model waiting. A GPU that failed needs a new process, and only this one ends with it. The parent
loads no torch.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from multiprocessing import Pipe
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from glmbatch.errors import GlmbatchError, InputError, TransientError
from glmbatch.glm.engine import serving
from glmbatch.glm.engine.calls import copy_of, serve
from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
)
from glmbatch.glm.engine.queue import Call
from glmbatch.glm.engine.serving import BATCH, LOGGED, READY, STOPPED, LoadedLimits

if TYPE_CHECKING:
    from glmbatch.glm.engine.loading import EngineSettings


class EngineProcess:
    """An `Engine` whose model is in another process, which ends with this one."""

    def __init__(self, settings: EngineSettings) -> None:
        """Start the process and wait until the model is loaded. Raises as `load_engine` does."""
        self._connection, child_end = Pipe()
        with child_end:
            self._process = _start(child_end.fileno())
        self._unsent: deque[Any] = deque()
        self._sending = threading.Lock()
        self._changing = threading.Lock()
        self._calls: dict[int, Call[Any]] = {}
        self._numbers = count()
        self._stopped: GlmbatchError | None = None
        self._loaded: SimpleQueue[LoadedLimits | None] = SimpleQueue()
        self._receiver = threading.Thread(
            target=self._receive, name="glmbatch-engine-results", daemon=True
        )
        self._receiver.start()
        try:
            self._send(settings)
            limits = self._loaded.get()
        except BaseException:  # an interrupt, while the model loads
            self.close()
            raise
        if limits is None:
            self.close()
            self._check_running()
            raise AssertionError("an engine that is not loaded has stopped")
        self._limits = limits

    @property
    def alive(self) -> bool:
        """Whether the engine takes calls. Once closed or failed, it never does again."""
        return self._stopped is None

    @property
    def pid(self) -> int:
        """The number of the engine's process."""
        return self._process.pid

    @property
    def arena_bytes(self) -> int:
        """See `Engine`. As it was when the model was loaded."""
        return self._limits.arena_bytes

    def classify(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyResult]:
        """See `Engine`."""
        self._check_running()
        return self._serve(requests)

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[GenerateResult]:
        """See `Engine`."""
        self._check_running()
        return self._serve(requests)

    def close(self) -> None:
        """End the process, which frees its device.

        Raises TransientError in callers that still wait for a result.
        """
        self._stop(TransientError("the engine was closed. Load it again."))
        self._process.kill()  # it has nothing to save
        self._receiver.join()

    def _serve(self, requests: Iterable[Any]) -> Iterator[Any]:
        call: Call[Any] = Call()
        number = next(self._numbers)
        batch: list[Any] = []

        def submit(request: Any) -> None:
            batch.append(request)
            if len(batch) == BATCH:
                flush()

        def flush() -> None:
            if batch:
                self._send((number, _pickled(batch)))
                batch.clear()

        with self._changing:
            self._check_running()
            self._calls[number] = call
        try:
            yield from serve(requests, call, self._limits, submit, flush)
        finally:
            # Waits for no lock: the garbage collector may run this in a thread that holds it.
            self._calls.pop(number, None)
            self._send((number, None))

    def _send(self, message: Any) -> None:
        """Send `message` after all earlier ones; if another call is sending, that one sends it."""
        self._unsent.append(message)
        while self._unsent and self._sending.acquire(blocking=False):
            try:
                while self._unsent:
                    # If the process has ended, the receiver tells the callers why.
                    with suppress(OSError):
                        self._connection.send(self._unsent[0])
                    self._unsent.popleft()
            except BaseException:  # an interrupt: it may have sent a part, of any call's message
                self._process.kill()
                raise
            finally:
                self._sending.release()

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise copy_of(self._stopped)

    def _stop(self, error: GlmbatchError) -> None:
        """Raise `error`, or the first such error, in all calls of now and later."""
        with self._changing:
            self._stopped = self._stopped or error
            for call in list(self._calls.values()):
                call.fail(copy_of(self._stopped))
            self._calls.clear()

    # The receiver's side: runs in a thread of its own.

    def _receive(self) -> None:
        try:
            while True:
                for target, value in pickle.loads(self._connection.recv_bytes()):
                    self._take(target, value)
        except (EOFError, OSError):
            pass
        finally:
            self._process.kill()  # usually it has ended already
            self._stop(TransientError(f"{_end_of(self._process.wait())}. Load it again."))
            self._loaded.put(None)
            with self._sending:  # its number may be another file's as soon as it is closed
                self._connection.close()

    def _take(self, target: int | str, value: Any) -> None:
        if target == READY:
            self._loaded.put(value)
        elif target == STOPPED:
            self._stop(value)
        elif target == LOGGED:
            name, level, text = value
            logging.getLogger(name).log(level, "%s", text)
        elif isinstance(target, int) and (call := self._calls.get(target)) is not None:
            if isinstance(value, Exception):
                call.fail(value)
            else:
                call.deliver(value)


def _start(handle: int) -> subprocess.Popen[bytes]:
    # Not multiprocessing's spawn, which would run the caller's own program again.
    code = (
        f"import sys; sys.path[:] = {[path for path in sys.path if isinstance(path, str)]!r}; "
        f"from {serving.__name__} import main; main({handle}, {os.getpid()})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[handle],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # a command's results; its errors go where ours go
        start_new_session=True,  # Ctrl-C is for the parent
    )


def _end_of(code: int) -> str:
    if code >= 0:
        return f"the engine's process ended with code {code}"
    return f"the engine's process was killed by {signal.Signals(-code).name}"


def _pickled(requests: list[Any]) -> bytes:
    try:
        return pickle.dumps(requests)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"a request cannot be sent to the engine's process: {error}. "
            "Set runtime.engine_process to false."
        ) from error
