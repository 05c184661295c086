"""Attention by each row's own places, on CPU with a substitute for torch's kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.model.flash import FlashCall, SingleQueries, serves
from tests.unit.glm.cuda_on_cpu import on_cuda_path, plain_flash
from tests.unit.glm.tiny_glm import causal_model, engine_over, head_model, prompts

LABELS = ((5,), (5, 6), (7, 8, 9), (7, 8, 10), (11,))
TEMPLATE = 20


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
def test_flash_calls_equal_a_loop_over_spans(
    labels: Any, prefix_places: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = head_model(prefix_places) if labels is None else causal_model(prefix_places)
    looped = all_answers(model, labels, shared)
    with on_cuda_path(monkeypatch):
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


def test_a_gpu_before_ampere_has_no_flash_call(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"cuda:98": (7, 5), "cuda:99": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: capability[str(at)])
    assert not serves(torch.device("cuda:98"), torch.float16)
    assert serves(torch.device("cuda:99"), torch.float16)


@pytest.mark.parametrize("behind", [0, 4])
def test_many_single_queries_are_rows_by_group(
    behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashCall, "__call__", plain_flash)
    generator = torch.Generator().manual_seed(0)
    rows, heads, groups, places = 5, 6, 2, 40
    # Heads of keys and values behind those of the queries are what one product leaves there.
    projected = torch.randn(rows, heads + behind, 8, generator=generator)
    keys, values = torch.randn(2, groups, places, 8, generator=generator)
    starts = torch.tensor([9, 0, 33, 20, 12, 0], dtype=torch.int32)
    used = torch.tensor([3, 7, 1, 13, 20], dtype=torch.int32)
    call = FlashCall(torch.arange(6, dtype=torch.int32), starts, used, 1, 20)
    expected, _ = call(projected[:, :heads], keys, values, 0.3)
    single = SingleQueries(starts, used, 20)
    for _ in range(2):  # the second layer uses the call of the first
        found = single.attend(projected[:, :heads], keys, values, 0.3)
        torch.testing.assert_close(found, expected)
        assert found.flatten(1).data_ptr() == found.data_ptr(), "the output is not copied"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_by_group_equal_the_operators_own_way() -> None:
    rows, places = 300, 30_000
    projected, kept = torch.randn(rows, 36, 128), torch.randn(2, 2, places, 128)
    projected, keys, values = (x.to("cuda", torch.bfloat16) for x in (projected, *kept))
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda") * 100 % (places - 99)
    used = torch.arange(rows, dtype=torch.int32, device="cuda") % 100 + 1
    each = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    expected = FlashCall(each, starts, used, 1, 100).attend(projected[:, :32], keys, values, 0.09)
    found = SingleQueries(starts, used, 100).attend(projected[:, :32], keys, values, 0.09)
    torch.testing.assert_close(found, expected)


def test_torch_has_the_operator_that_is_called() -> None:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        "query",
        "key",
        "value",
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
        "return_debug_mask",
    ]
    assert {"scale", "window_size_left", "window_size_right", "seqused_k"} <= set(names[10:])
    assert [result.name for result in schema.returns][:2] == ["output", "softmax_logsumexp"]
