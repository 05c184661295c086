"""Recorded decode steps equal plain ones; on CPU, with a substitute for the recorder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.glm.model.cuda_graphs import StepGraphs, row_bucket
from tests.unit.glm.tiny_glm import causal_model, engine_over, prompts


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


def requests() -> list[GenerateRequest]:
    made = []
    for at, row in enumerate(prompts(40, longest=50)):
        ids = [*range(20, 40), *row]
        temperature, shared = at % 3 * 0.6, at % 2 * 20
        made.append(
            GenerateRequest(at, ids, 5 + at % 90, temperature, seed=at, shared_tokens=shared)
        )
    return made


def with_graphs(engine: TorchEngine, recorder: Recorder) -> None:
    network = engine._network
    network._graphs = StepGraphs(network._padded_step, lambda: recorder)


@pytest.mark.parametrize("prefix_places", [0, 5])
def test_a_replayed_step_equals_a_plain_one(prefix_places: int) -> None:
    model, recorder = causal_model(prefix_places), Recorder()
    with engine_over(model, max_slots=11) as engine:
        plain = {result.index: result for result in engine.generate(requests())}
    with engine_over(model, max_slots=11) as engine:
        with_graphs(engine, recorder)
        recorded = {result.index: result for result in engine.generate(requests())}
    assert recorded == plain
    assert 3 * recorder.recorded < recorder.replayed, "a step is recorded once for many replays"


def test_a_step_that_cannot_be_recorded_runs_plain() -> None:
    def refuse(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        raise RuntimeError("CUDA error: out of memory")

    model = causal_model()
    with engine_over(model, max_slots=11) as engine:
        plain = {result.index: result for result in engine.generate(requests())}
    with engine_over(model, max_slots=11) as engine:
        network = engine._network
        network._graphs = StepGraphs(network._padded_step, lambda: refuse)
        assert {result.index: result for result in engine.generate(requests())} == plain


def test_slots_are_rounded_up_by_at_most_an_eighth() -> None:
    assert [slot_bucket(slots) for slots in (1, 2, 3, 5, 9, 16)] == [1, 2, 4, 8, 16, 16]
    for slots in range(17, 2000):
        assert slots <= slot_bucket(slots) <= slots * 1.125
    assert len({slot_bucket(slots) for slots in range(1, 1025)}) < 60


def test_places_are_rounded_up_by_at_most_a_quarter() -> None:
    assert [place_bucket(places) for places in (1, 64, 65, 256)] == [
        BLOCK,
        BLOCK,
        2 * BLOCK,
        4 * BLOCK,
    ]
    for places in range(4 * BLOCK, 40_000, 7):
        assert places <= place_bucket(places) <= places * 1.26
        assert place_bucket(places) % BLOCK == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graphs_equal_plain_steps(dtype: str) -> None:
    model = causal_model().to("cuda", getattr(torch, dtype))
    with engine_over(model, max_slots=11) as engine:
        recorded = {result.index: result for result in engine.generate(requests())}
    with engine_over(model, max_slots=11) as engine:
        with_graphs(engine, Recorder())
        replayed = {result.index: result for result in engine.generate(requests())}
    assert recorded == replayed
