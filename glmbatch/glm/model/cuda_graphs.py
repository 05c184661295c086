"""Records decode steps as CUDA graphs and replays them: one launch instead of some 500.

A graph has fixed shapes and addresses. So there is one for each number of slots and of places, both
rounded up, and all are dropped when the tensors of the cache are replaced. Knows no requests.

Shapes: S slots, C hidden size. 2: the token of a slot and its position.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from glmbatch.glm.model.kv_cache import BLOCK, SlotCache

logger = logging.getLogger(__name__)

# Each graph takes some megabytes of device memory.
MAX_GRAPHS = 96
# Two engines must not record at the same time.
_RECORDING = threading.Lock()

Step = Callable[[torch.Tensor, int, SlotCache], torch.Tensor]
Replay = Callable[[], object]
Record = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs_2S: torch.Tensor
    replay: Replay
    hidden_SC: torch.Tensor


class StepGraphs:
    """Runs `step(inputs_2S, places, cache)` by replaying a recording of it.

    `recorder` creates a recorder, `CudaRecorder` by default.
    """

    def __init__(self, step: Step, recorder: Callable[[], Record] | None = None) -> None:
        self._step = step
        self._recorder = recorder or CudaRecorder
        self._version: int | None = None
        self._refused: set[tuple[int, int]] = set()
        self.clear()

    def __call__(self, inputs_2S: torch.Tensor, places: int, cache: SlotCache) -> torch.Tensor:
        """The result [S, C] of `step` for the first S slots; valid only until the next call.

        Records the step if there is no graph of its shape; if that fails, calls `step` directly.
        """
        if self._version != cache.version or len(self._recordings) > MAX_GRAPHS:
            self.clear()
            self._version = cache.version
        slots = inputs_2S.shape[1]
        shape = (
            min(slot_bucket(slots), cache.slots),
            min(place_bucket(places), cache.length),
        )
        if shape not in self._recordings and shape not in self._refused:
            self._record_step(*shape, inputs_2S, cache)
        recording = self._recordings.get(shape)
        if recording is None:
            return self._step(inputs_2S, places, cache)
        # The slots after the live ones are free: a prefill overwrites what the graph writes there.
        recording.inputs_2S[:, slots:] = 0
        recording.inputs_2S[:, :slots] = inputs_2S
        recording.replay()
        return recording.hidden_SC[:slots]

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        self._recordings: dict[tuple[int, int], _Recording] = {}
        # With a new recorder, because a memory pool without graphs cannot be reused.
        self._record = self._recorder()

    def _record_step(
        self, slots: int, places: int, inputs_2S: torch.Tensor, cache: SlotCache
    ) -> None:
        """Record a step of this shape. If that fails (out of memory, say), never try it again."""
        static_2S = inputs_2S.new_zeros(2, slots)
        static_2S[:, : inputs_2S.shape[1]] = inputs_2S
        try:
            replay, hidden_SC = self._record(lambda: self._step(static_2S, places, cache))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("decode steps of %d slots run without a CUDA graph: %s", slots, reason)
            self._refused.add((slots, places))
            self.clear()
        else:
            self._recordings[slots, places] = _Recording(static_2S, replay, hidden_SC)


class CudaRecorder:
    """Records CUDA graphs with one memory pool and stream, on the thread's current device."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """Run `work` once and record it; returns its replay and the tensor that it writes.

        Raises RuntimeError if it cannot be recorded.
        """
        with _RECORDING:
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                # On their first run on a stream, kernels allocate workspaces, which must not be
                # recorded.
                work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # "thread_local" lets the engine of a second model allocate in its own thread.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                out = work()
        return graph.replay, out


def slot_bucket(slots: int) -> int:
    """`slots` rounded up: to a power of two up to 16, by at most an eighth above."""
    bits = (slots - 1).bit_length()
    if slots <= 16:
        return 1 << bits
    coarse = 1 << (bits - 4)
    return -(-slots // coarse) * coarse


def place_bucket(places: int) -> int:
    """`places` rounded up: to a multiple of BLOCK, and by at most a quarter above four blocks."""
    blocks = -(-places // BLOCK)
    coarse = 1 << max(0, (blocks - 1).bit_length() - 3)
    return -(-blocks // coarse) * coarse * BLOCK
