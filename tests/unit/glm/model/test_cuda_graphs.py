"""Recorded decode steps equal plain ones; on CPU, with a substitute for the recorder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from glmbatch.glm.engine.loading import warm_up
from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.model import cuda_graphs
from glmbatch.glm.model.cuda_graphs import row_bucket
from tests.unit.glm.cuda_on_cpu import Recorder, on_cuda_path
from tests.unit.glm.tiny_glm import causal_model, engine_over, head_model, plain_greedy, prompts


def requests() -> list[GenerateRequest]:
    made = []
    for at, row in enumerate(prompts(40, longest=50)):
        ids = [*range(20, 40), *row]
        temperature, shared = at % 3 * 0.6, at % 2 * 20
        made.append(
            GenerateRequest(at, ids, 5 + at % 90, temperature, seed=at, shared_tokens=shared)
        )
    return made


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Lets decode steps be recorded on CPU; yields the recorder."""
    with on_cuda_path(monkeypatch) as recorder:
        yield recorder


@pytest.mark.parametrize("prefix_places", [0, 5])
def test_a_replayed_step_equals_a_plain_one(prefix_places: int, as_on_cuda: Recorder) -> None:
    model = causal_model(prefix_places)
    with engine_over(model, max_slots=11) as engine:
        recorded = {result.index: result for result in engine.generate(requests())}
    assert as_on_cuda.replayed > 3 * as_on_cuda.recorded > 0, "a step is recorded for many replays"
    assert as_on_cuda.recorded <= 5, "one recording for each rounded number of rows"
    for request in requests():
        if request.temperature == 0:
            expected = plain_greedy(model, request.prompt_ids, request.max_tokens)
            assert (recorded[request.index].ids, recorded[request.index].finish_reason) == expected


def test_a_step_that_cannot_be_recorded_runs_plain(
    as_on_cuda: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        raise RuntimeError("CUDA error: out of memory")

    model = causal_model()
    with engine_over(model, max_slots=11) as engine:
        recorded = {result.index: result for result in engine.generate(requests())}
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", lambda: refuse)
    with engine_over(model, max_slots=11) as engine:
        assert {result.index: result for result in engine.generate(requests())} == recorded


@pytest.mark.parametrize("rows", [1, 12, 16])
def test_nothing_is_recorded_after_the_warm_up(rows: int, as_on_cuda: Recorder) -> None:
    answers = []
    for warm in (True, False):
        with engine_over(causal_model(), max_slots=rows) as engine:
            if warm:
                warm_up(engine)
            recorded = as_on_cuda.recorded
            asked = [GenerateRequest(at, [5, 6, at + 7], 30) for at in range(rows)]
            answers.append(sorted(engine.generate(asked), key=lambda result: result.index))
            assert (as_on_cuda.recorded == recorded) is warm
    assert answers[0] == answers[1]


def test_a_classifier_is_warmed_up_too(as_on_cuda: Recorder) -> None:
    with engine_over(head_model()) as engine:
        warm_up(engine)
    assert not as_on_cuda.recorded


def test_rows_are_rounded_up_by_at_most_an_eighth() -> None:
    assert [row_bucket(rows) for rows in (1, 2, 3, 5, 9, 16)] == [1, 2, 4, 8, 16, 16]
    for rows in range(17, 2000):
        assert rows <= row_bucket(rows) <= rows * 1.125
    assert len({row_bucket(rows) for rows in range(1, 1025)}) < 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_equal_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_model().to("cuda", torch.bfloat16)
    with engine_over(model, max_slots=11) as engine:
        recorded = {result.index: result for result in engine.generate(requests())}
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", Recorder)
    with engine_over(model, max_slots=11) as engine:
        assert {result.index: result for result in engine.generate(requests())} == recorded
