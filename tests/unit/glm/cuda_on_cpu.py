"""Takes every way of the engine that CUDA takes, on CPU, with plain loops for its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from glmbatch.glm.engine.classify import Classification
from glmbatch.glm.engine.generate import Generation
from glmbatch.glm.model import cuda_graphs, flash, network
from glmbatch.glm.model.flash import FlashCall


class Recorder:
    """Behaves like a recording: repeats the same work on the same tensors."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(
        self, work: Callable[[], torch.Tensor]
    ) -> tuple[Callable[[], object], torch.Tensor]:
        self.recorded += 1
        out = torch.full_like(work(), torch.nan)

        def replay() -> None:
            self.replayed += 1
            out.copy_(work())

        return replay, out


@contextmanager
def on_cuda_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Engines made here attend by flash calls, record decode steps and launch ahead."""
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(flash, "serves", lambda device, dtype: True)
        patch.setattr(network, "serves", lambda device, dtype: True)
        patch.setattr(FlashCall, "__call__", plain_flash)
        patch.setattr(flash, "UNSPLIT_ROWS", 4)  # more and fewer rows take different ways
        patch.setattr(cuda_graphs, "CudaRecorder", lambda: recorder)
        for kind in (Generation, Classification):
            patch.setattr(kind, "__init__", _running_ahead(kind))
        yield recorder


def _running_ahead(kind: Any) -> Callable[..., None]:
    begin = kind.__init__

    def run_ahead(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self._runs_ahead = True

    return run_ahead


def plain_flash(
    call: FlashCall,
    query_QHD: torch.Tensor,
    keys_GPD: torch.Tensor,
    values_GPD: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator computes, row by row: no place beyond a row's own is read."""
    assert call.ends_R1.dtype == call.starts_R1.dtype == call.used_R.dtype == torch.int32
    assert len(call.ends_R1) == len(call.starts_R1) == len(call.used_R) + 1
    assert int(call.used_R.max()) <= call.max_used
    assert int(call.ends_R1.diff().max()) <= call.max_queries
    out = torch.full_like(query_QHD, torch.nan)
    log_sums = torch.full((query_QHD.shape[1], len(query_QHD)), torch.nan)
    of_group = query_QHD.shape[1] // len(keys_GPD)
    ends, starts = call.ends_R1.tolist(), call.starts_R1.tolist()
    for row, used in enumerate(call.used_R.tolist()):
        queries, own = slice(ends[row], ends[row + 1]), slice(starts[row], starts[row] + used)
        query = query_QHD[queries].transpose(0, 1).float()
        keys, values = (
            both[:, own].float().repeat_interleave(of_group, 0) for both in (keys_GPD, values_GPD)
        )
        scores = query @ keys.transpose(1, 2) * scaling
        if call.causal:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(used - query.shape[1])
            scores = scores.masked_fill(~visible, -torch.inf)
        out[queries] = (scores.softmax(-1) @ values).transpose(0, 1).to(out.dtype)
        log_sums[:, queries] = scores.logsumexp(-1)
    return out, log_sums
