"""Records decode steps as CUDA graphs and replays them: one launch instead of some 500.

A graph has fixed shapes and addresses. Lengths and places of rows are inputs of a step, so there is
one graph for each rounded number of rows. All are dropped with the arena whose memory they use.
Knows no requests.

Shapes: R rows, C hidden size. 4: the token of a row, its position, its first place and the number
of its places.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Two engines must not record at the same time.
_RECORDING = threading.Lock()
# A step is recorded when its shape comes up for the third time: many shapes come up once.
RECORD_AT = 3

Step = Callable[[torch.Tensor, int], torch.Tensor]
Replay = Callable[[], object]
Record = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs_4R: torch.Tensor
    replay: Replay
    hidden_RC: torch.Tensor


class StepGraphs:
    """Runs `step(inputs_4R, max_used)` by replaying a recording of it.

    Rows that fill a shape up have one place, `spare_place`, where a step may write anything.
    `recorder` creates a recorder, `CudaRecorder` by default.
    """

    def __init__(
        self, step: Step, spare_place: int, recorder: Callable[[], Record] | None = None
    ) -> None:
        self._step = step
        self._spare_place = spare_place
        self._record = (recorder or CudaRecorder)()
        self._uses: dict[tuple[int, int], int] = {}
        self._recordings: dict[tuple[int, int], _Recording | None] = {}

    def __call__(self, inputs_4R: torch.Tensor, max_used: int) -> torch.Tensor:
        """The result [R, C] of `step`; valid only until the next call.

        If a shape cannot be recorded, calls `step` directly.
        """
        rows = inputs_4R.shape[1]
        shape = row_bucket(rows), max_used
        self._uses[shape] = self._uses.get(shape, 0) + 1
        if shape not in self._recordings and self._uses[shape] >= RECORD_AT:
            self._recordings[shape] = self._record_step(*shape, inputs_4R)
        recording = self._recordings.get(shape)
        if recording is None:
            return self._step(inputs_4R, max_used)
        self._fill(recording.inputs_4R, inputs_4R)
        recording.replay()
        return recording.hidden_RC[:rows]

    def _fill(self, static_4R: torch.Tensor, inputs_4R: torch.Tensor) -> None:
        rows = inputs_4R.shape[1]
        static_4R[:, :rows] = inputs_4R
        static_4R[:2, rows:] = 0
        static_4R[2, rows:] = self._spare_place
        static_4R[3, rows:] = 1

    def _record_step(self, rows: int, max_used: int, inputs_4R: torch.Tensor) -> _Recording | None:
        static_4R = inputs_4R.new_zeros(4, rows)
        self._fill(static_4R, inputs_4R)
        step = self._step  # a recording that refers to `self` would keep both until a collection
        try:
            replay, hidden_RC = self._record(lambda: step(static_4R, max_used))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("decode steps of %d rows run without a CUDA graph: %s", rows, reason)
            return None
        return _Recording(static_4R, replay, hidden_RC)


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


def row_bucket(rows: int) -> int:
    """`rows` rounded up: to a power of two up to 16, by at most an eighth above."""
    bits = (rows - 1).bit_length()
    if rows <= 16:
        return 1 << bits
    coarse = 1 << (bits - 4)
    return -(-rows // coarse) * coarse
