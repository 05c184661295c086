"""The engine on one device: threads submit requests, one worker thread runs the model for all.

Knows no tensors: `Classification` and `Generation` run the model and take turns.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

import torch

from glmbatch.errors import GlmbatchError, TransientError
from glmbatch.glm.device import free_memory_bytes, prepare_cuda
from glmbatch.glm.engine.calls import copy_of, serve
from glmbatch.glm.engine.classify import Classification
from glmbatch.glm.engine.generate import Generation
from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
)
from glmbatch.glm.engine.queue import Call, Limits, PendingRequest
from glmbatch.glm.engine.validate import ModelLimits
from glmbatch.glm.model.network import Network
from glmbatch.glm.oom import device_lost

logger = logging.getLogger(__name__)

# A thread that runs Python keeps the lock so long before the worker gets it back. Python's own
# 5 ms would be lost at many of the thousand calls of a forward.
SWITCH_SECONDS = 0.0005


class TorchEngine:
    """An `Engine` over a loaded GLM model, whose weights it takes over from `model`."""

    def __init__(  # noqa: PLR0913 - three limits and two facts about the tokenizer
        self,
        model: Any,
        *,
        eos_id: int,
        token_count: int,
        max_batch_tokens: int | None = None,
        max_slots: int | None = None,
        cache_bytes: int | None = None,
        models_at_once: int = 1,
        arenas_bytes: int = 0,
        quantization: str = "none",
    ) -> None:
        """Start the worker thread. A limit of None gets a default for the model's device.

        Ids from `token_count` on are padding of the vocabulary and are never generated.
        `cache_bytes` limits the KV cache. `models_at_once` engines share the device's memory, of
        which their arenas hold `arenas_bytes` already. `quantization` is as in `Network`.
        """
        self._network = Network(model.eval(), token_count, quantization)
        on_cuda = self._network.device.type == "cuda"
        if on_cuda:
            prepare_cuda()
        if cache_bytes is None:
            cache_bytes = _cache_bytes(self._network.device, models_at_once, arenas_bytes)
        self.limits = Limits(
            batch_tokens=max_batch_tokens or (16_384 if on_cuda else 2_048),
            slots=max_slots or (1024 if on_cuda else 32),
            cache_bytes=cache_bytes,
        )
        self._generation = Generation(self._network, self.limits, eos_id)
        self._classification = Classification(self._network, self.limits, self._generation)
        # Seconds of device time that each kind of request has used.
        kinds: tuple[Classification | Generation, ...] = (self._classification, self._generation)
        self._seconds = dict.fromkeys(kinds, 0.0)
        self._changed = threading.Condition()
        self._calls: set[Call[Any]] = set()
        self._inbox: list[tuple[Callable[[Any], None], PendingRequest[Any]]] = []
        self._arrivals = count()
        self._stopped: GlmbatchError | None = None
        self._worker = threading.Thread(target=self._work, name="glmbatch-engine", daemon=True)
        # Python ends a daemon thread that waits for its lock, which in torch's code aborts the
        # process: "terminate called without an active exception".
        atexit.register(self.close)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether the engine takes calls. Once closed or failed, it never does again."""
        return self._stopped is None

    @property
    def slots(self) -> int:
        """At most so many rows are generated at once."""
        return self._generation.slots

    @property
    def arena_bytes(self) -> int:
        """See `Engine`."""
        return self._generation.arena_bytes

    @property
    def model_limits(self) -> ModelLimits:
        """The limits of the model, against which requests are checked."""
        return self._network

    def classify(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyResult]:
        """See `Engine`."""
        self._check_running()
        return self._serve(requests)

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[GenerateResult]:
        """See `Engine`."""
        self._check_running()
        return self._serve(requests)

    def close(self) -> None:
        """Stop the worker after its current forward.

        Raises TransientError in callers that still wait for a result.
        """
        with self._changed:
            self._stopped = self._stopped or TransientError("the engine was closed. Load it again.")
            self._changed.notify_all()
        self._worker.join()

    # The caller's side: runs in the thread of the caller.

    def _serve(self, requests: Iterable[Any]) -> Iterator[Any]:
        call: Call[Any] = Call()
        with self._changed:
            self._calls.add(call)
        try:
            yield from serve(requests, call, self._network, partial(self.submit, call))
        finally:
            with self._changed:
                self._calls.discard(call)

    def submit(self, call: Call[Any], request: ClassifyRequest | GenerateRequest) -> None:
        """Queue a valid `request`; its result goes to `call`. Raises why the engine stopped."""
        push: Callable[[Any], None] = self._generation.push
        if isinstance(request, ClassifyRequest):
            push = self._classification.push
        with self._changed:
            self._check_running()
            self._inbox.append((push, PendingRequest(call, request, next(self._arrivals))))
            self._changed.notify()

    def wait(self) -> GlmbatchError:
        """Wait until the engine was closed or failed; returns the reason."""
        self._worker.join()
        assert self._stopped is not None
        return self._stopped

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise copy_of(self._stopped)

    # The worker's side: runs in the worker thread.

    def _work(self) -> None:
        # For the whole process, and never longer again: another engine may need it too.
        sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
        try:
            if self._network.device.type == "cuda":
                # Streams and graphs are created on the thread's current device.
                torch.cuda.set_device(self._network.device)
            with torch.inference_mode():
                while self._receive():
                    self._run_batch()
        except BaseException as error:  # noqa: BLE001 - raised in every call
            self._stop(error)
        finally:
            atexit.unregister(self.close)  # it would keep an engine that has failed
            with self._changed:
                assert self._stopped is not None
                # A copy, because a finalizer in this thread may end a call.
                for call in list(self._calls):
                    call.fail(copy_of(self._stopped))

    def _receive(self) -> bool:
        """Queue new requests, waiting while there is nothing to do; returns False once closed."""
        with self._changed:
            while not (self._stopped or self._inbox or self._busy_kinds()):
                self._changed.wait()
            if self._stopped:
                return False
            inbox = self._inbox
            self._inbox = []
        for push, pending in inbox:
            push(pending)
        return True

    def _busy_kinds(self) -> list[Classification | Generation]:
        return [kind for kind in self._seconds if kind.busy]

    def _run_batch(self) -> None:
        """Run one batch of the kind of request that has used less device time so far."""
        busy = self._busy_kinds()
        kind = min(busy, key=self._seconds.__getitem__)
        began = perf_counter()
        kind.run_batch()
        self._seconds[kind] += perf_counter() - began
        if len(busy) == 1:
            # Do not let an idle kind save up time: it would stall the other for as long.
            self._seconds = dict.fromkeys(self._seconds, self._seconds[kind])

    def _stop(self, error: BaseException) -> None:
        stopped: GlmbatchError | None = device_lost(error, self._network.device)
        if stopped is None:
            logger.exception("the engine stopped")
            reason = f"{type(error).__name__}: {error}"
            stopped = TransientError(f"the engine stopped: {reason}. Load it again.")
        else:
            logger.error("the engine stopped: %s", stopped)  # no fault in the code that ran
        # The error is kept, and its frames would keep this engine and the failed forward's tensors.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        stopped.__cause__ = error
        with self._changed:
            self._stopped = stopped


def _cache_bytes(device: torch.device, models_at_once: int, arenas_bytes: int) -> int:
    """The share of one engine, whose size does not depend on which is loaded first."""
    # On CUDA, the rest is for activations; on CPU, other processes need memory too.
    share = 0.8 if device.type == "cuda" else 0.25
    free = free_memory_bytes(str(device))
    return int(share * min(free, (free + arenas_bytes) / models_at_once))
