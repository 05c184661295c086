"""Any arrivals, cancellations, stops and lacks of memory: each row is answered as it is alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmbatch.glm.engine.generate import Generation
from glmbatch.glm.engine.protocol import GenerateRequest, GenerateResult
from glmbatch.glm.engine.queue import Call, Limits, PendingRequest
from glmbatch.glm.model.network import Network
from tests.unit.glm.cuda_on_cpu import on_cuda_path
from tests.unit.glm.tiny_glm import EOS, TOKENS, causal_model

PLACE_BYTES = 2 * 3 * 2 * 16 * 4


class Unreliable(torch.nn.Module):
    """An embedding that runs out of memory now and then."""

    def __init__(self, embedding: torch.nn.Module) -> None:
        super().__init__()
        self.embedding, self.weight = embedding, embedding.weight
        self.failing: Iterator[bool] = iter(())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if next(self.failing, False):
            raise torch.OutOfMemoryError("out of memory")
        embedded: torch.Tensor = self.embedding(ids)
        return embedded


def stop_at_multiple(ids: Sequence[int]) -> bool:
    return sum(ids) % 7 == 0


def requests() -> list[GenerateRequest]:
    rng = random.Random(5)
    template = [rng.randrange(3, TOKENS) for _ in range(18)]
    made = []
    for at in range(10):
        ids = [rng.randrange(3, TOKENS) for _ in range(rng.randint(1, 50))]
        made.append(
            GenerateRequest(
                at,
                [*template, *ids] if at % 3 == 0 else ids,
                rng.choice([1, 2, 9, 30]),
                temperature=at % 2 * 1.3,
                top_p=(1.0, 0.8)[at % 4 // 2],
                seed=at,
                repetition_penalty=(1.0, 1.3)[at % 5 == 1],
                no_repeat_ngram_size=(0, 2)[at % 5 == 2],
                should_stop=stop_at_multiple if at % 4 == 3 else None,
                shared_tokens=18 if at % 3 == 0 else 0,
            )
        )
    return made


class Engine:
    """Generation without the worker thread, so that a run can be repeated."""

    def __init__(self, network: Network, slots: int, budget: int, places: int) -> None:
        self.limits = Limits(budget, slots, places * PLACE_BYTES)
        self.generation = Generation(network, self.limits, EOS)
        self.calls: dict[int, Call[GenerateResult]] = {}

    def push(self, request: GenerateRequest) -> None:
        self.calls[request.index] = call = Call()
        self.generation.push(PendingRequest(call, request, request.index))

    def to_the_end(self) -> dict[int, GenerateResult]:
        batches = 0
        while self.generation.busy:
            self.generation.run_batch()
            batches += 1
            assert batches < 5000, "it never ends"
        results = {}
        for index, call in self.calls.items():
            assert call.results.qsize() <= 1, "a row is answered once"
            if not call.results.empty():
                results[index] = call.results.get()
        return results


@pytest.mark.parametrize("ahead", [False, True])
@given(data=st.data())
@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_any_order_gives_the_answers_of_each_row_alone(
    ahead: bool, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    with on_cuda_path(monkeypatch) if ahead else nullcontext(), torch.inference_mode():
        network, embedding, expected = _alone(ahead)
        engine = Engine(
            network,
            slots=data.draw(st.integers(1, 6)),
            budget=data.draw(st.integers(8, 120)),
            places=data.draw(st.integers(110, 400)),
        )
        rng = random.Random(data.draw(st.integers(0, 2**32)))
        failures = data.draw(st.sampled_from([0, 0, 0.02, 0.1]))
        embedding.failing = iter([rng.random() < failures for _ in range(300)])
        cancelled = data.draw(st.sets(st.integers(0, 9), max_size=3))
        for request in data.draw(st.permutations(requests())):
            engine.push(request)
            for _ in range(rng.choice([0, 0, 1, 5])):
                engine.generation.run_batch()
            if rng.random() < 0.3 and cancelled:
                engine.calls.get(cancelled.pop(), Call()).cancelled = True
        if rng.random() < 0.3:
            engine.generation.preempt()
        results = engine.to_the_end()
    for index, call in engine.calls.items():
        if index in results or not call.cancelled:
            assert results[index] == expected[index]


_ALONE: dict[bool, Any] = {}


def _alone(ahead: bool) -> tuple[Network, Unreliable, dict[int, GenerateResult]]:
    if ahead not in _ALONE:
        model = causal_model()
        model.model.embed_tokens = embedding = Unreliable(model.model.embed_tokens)
        network = Network(model, TOKENS)
        results: dict[int, GenerateResult] = {}
        for request in requests():
            engine = Engine(network, slots=1, budget=512, places=400)
            engine.push(request)
            results |= engine.to_the_end()
        _ALONE[ahead] = network, embedding, results
    return _ALONE[ahead]  # type: ignore[no-any-return]
