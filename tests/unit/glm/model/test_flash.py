"""Attention by each row's own places, on CPU with a substitute for torch's kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glmbatch.glm.engine.generate import Generation
from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.model import cuda_graphs, flash, network
from glmbatch.glm.model.flash import FlashCall
from tests.unit.glm.model.test_cuda_graphs import Recorder
from tests.unit.glm.tiny_glm import causal_model, engine_over, head_model, prompts

LABELS = ((5,), (5, 6), (7, 8, 9), (7, 8, 10), (11,))
TEMPLATE = 20


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


def all_answers(
    model: Any, labels: Any, shared: int
) -> tuple[list[tuple[float, ...]], list[tuple[int, ...]]]:
    template = [*range(20, 20 + TEMPLATE)]
    rows = [[*template, *row] for row in prompts(12, longest=30)]
    with engine_over(model, max_slots=5, max_batch_tokens=150) as engine:
        classify = engine.classify(
            ClassifyRequest(at, row, labels, shared) for at, row in enumerate(rows)
        )
        scores = [result.scores for result in sorted(classify, key=lambda result: result.index)]
        if labels is None:
            return scores, []
        generate = engine.generate(
            GenerateRequest(at, row, 7, shared_tokens=shared) for at, row in enumerate(rows)
        )
        return scores, [result.ids for result in sorted(generate, key=lambda result: result.index)]


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every way that CUDA takes, with plain loops instead of its kernels."""
    monkeypatch.setattr(flash, "serves", lambda device, dtype: True)
    monkeypatch.setattr(network, "serves", lambda device, dtype: True)
    monkeypatch.setattr(FlashCall, "__call__", plain_flash)
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", Recorder)
    begin = Generation.__init__

    def run_ahead(self: Generation, *arguments: Any) -> None:
        begin(self, *arguments)
        self._runs_ahead = True

    monkeypatch.setattr(Generation, "__init__", run_ahead)


@pytest.mark.parametrize("shared", [0, TEMPLATE])
@pytest.mark.parametrize("prefix_places", [0, 5])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_flash_calls_equal_a_loop_over_spans(
    labels: Any, prefix_places: int, shared: int, request: pytest.FixtureRequest
) -> None:
    model = head_model(prefix_places) if labels is None else causal_model(prefix_places)
    looped = all_answers(model, labels, shared)
    request.getfixturevalue("as_on_cuda")
    scores, ids = all_answers(model, labels, shared)
    assert ids == looped[1]
    for one, other in zip(scores, looped[0], strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-3), ("float16", 0.05), ("bfloat16", 0.5)]
)
@pytest.mark.parametrize("shared", [0, TEMPLATE])
def test_cuda_and_cpu_give_the_same_answers(dtype: str, tolerance: float, shared: int) -> None:
    model = causal_model(5)
    on_cuda = copy.deepcopy(model).to("cuda", getattr(torch, dtype))
    expected, actual = all_answers(model, LABELS, shared), all_answers(on_cuda, LABELS, shared)
    for one, other in zip(expected[0], actual[0], strict=True):
        assert one == pytest.approx(other, abs=tolerance, rel=0)
    assert dtype != "float32" or expected[1] == actual[1]
