"""Steps recorded once as CUDA graphs and replayed: a step of small kernels then costs the host one launch, not 500.

A graph holds its shapes and addresses, so there is one for each number of slots and of places looked at, both rounded
up; a cache that was laid out anew takes its graphs with it. Knows no requests.

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

# Graphs kept at most; each holds some megabytes of the device.
MOST = 96
# Recordings of two engines would disturb one another.
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
    """`step(inputs_2S, places, cache)`, replayed. A recorder runs a function once and says how to run it again."""

    def __init__(self, step: Step, recorder: Callable[[], Record] | None = None) -> None:
        self._step, self._recorder = step, recorder or CudaRecorder
        self._version: int | None = None
        self._refused: set[tuple[int, int]] = set()
        self.forget()

    def __call__(self, inputs_2S: torch.Tensor, places: int, cache: SlotCache) -> torch.Tensor:
        """What `step` returns for the first S slots; only good until the next call."""
        if self._version != cache.version or len(self._recordings) > MOST:
            self.forget()
            self._version = cache.version
        slots = inputs_2S.shape[1]
        shape = min(slot_bucket(slots), cache.slots), min(place_bucket(places), cache.length)
        if shape not in self._recordings and shape not in self._refused:
            self._try(*shape, inputs_2S, cache)
        recording = self._recordings.get(shape)
        if recording is None:
            return self._step(inputs_2S, places, cache)
        # Slots beyond the live ones are free: what is written into their first place is written over on entry.
        recording.inputs_2S[:, slots:] = 0
        recording.inputs_2S[:, :slots] = inputs_2S
        recording.replay()
        return recording.hidden_SC[:slots]

    def forget(self) -> None:
        """Give the graphs' memory back."""
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._record = (
            self._recorder()
        )  # a pool of memory whose graphs are all gone cannot be used again

    def _try(self, slots: int, places: int, inputs_2S: torch.Tensor, cache: SlotCache) -> None:
        """Record a step; one that cannot be recorded, for want of memory say, is run as it is from then on."""
        static_2S = inputs_2S.new_zeros(2, slots)
        static_2S[:, : inputs_2S.shape[1]] = inputs_2S
        try:
            replay, hidden_SC = self._record(lambda: self._step(static_2S, places, cache))
        except RuntimeError as error:
            logger.warning(
                "a step of %d slots is not recorded: %s", slots, str(error).partition("\n")[0]
            )
            self._refused.add((slots, places))
            self.forget()
        else:
            self._recordings[slots, places] = _Recording(static_2S, replay, hidden_SC)


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory and one stream, on the thread's own device."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        with _RECORDING:
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()  # kernels take their workspaces on the stream's first run, which no recording may see
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as the engine of a second model, may go on allocating meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                out = work()
        return graph.replay, out


def slot_bucket(slots: int) -> int:
    """`slots` rounded up: to a power of two, above 16 by at most an eighth."""
    coarse = max(1, 1 << max(0, (slots - 1).bit_length() - (4 if slots > 16 else 0)))
    return -(-slots // coarse) * coarse if slots > 16 else coarse


def place_bucket(places: int) -> int:
    """`places` rounded up to whole blocks, above 4 of them by at most a quarter."""
    blocks = -(-places // BLOCK)
    coarse = 1 << max(0, (blocks - 1).bit_length() - 3)
    return -(-blocks // coarse) * coarse * BLOCK
