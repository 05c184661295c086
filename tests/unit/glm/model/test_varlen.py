"""Attention of a whole batch in two calls, on CPU with a substitute for torch's kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.model import varlen
from tests.unit.glm.tiny_glm import causal_model, engine_over, head_model, prompts

LABELS = ((5,), (5, 6), (7, 8, 9), (7, 8, 10), (11,))
TEMPLATE = 20


def documented_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """As `torch.nn.attention.varlen` is documented: no grouped queries, causal from the end."""
    assert window_size == (-1, 0)
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    out = torch.empty_like(query)
    for at in range(len(cu_seq_q) - 1):
        q, k = slice(cu_seq_q[at], cu_seq_q[at + 1]), slice(cu_seq_k[at], cu_seq_k[at + 1])
        queries, keys = query[q].transpose(0, 1), key[k].transpose(0, 1)
        visible = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(
            keys.shape[1] - queries.shape[1]
        )
        attended = scaled_dot_product_attention(
            queries, keys, value[k].transpose(0, 1), visible, scale=scale
        )
        out[q] = attended.transpose(0, 1)
    return out


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


@pytest.mark.parametrize("shared", [0, TEMPLATE])
@pytest.mark.parametrize("prefix_places", [0, 5])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_varlen_calls_equal_a_loop_over_spans(
    labels: Any, prefix_places: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = head_model(prefix_places) if labels is None else causal_model(prefix_places)
    looped = all_answers(model, labels, shared)
    monkeypatch.setattr(varlen, "varlen_attn", documented_varlen_attn)
    monkeypatch.setattr(varlen, "serves", lambda device, dtype: True)
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
