"""Any arrivals, cancellations, stops and lacks of memory: each row is answered as it is alone.

GLM_EXAMPLES sets how many orders are tried; 200 for acceptance, which takes two minutes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmbatch.glm.engine.generate import Generation
from glmbatch.glm.engine.protocol import GenerateRequest, GenerateResult
from glmbatch.glm.engine.queue import MIN_CHUNK_TOKENS, Call, Limits, PendingRequest
from glmbatch.glm.model.network import Network
from tests.unit.glm.cuda_on_cpu import on_cuda_path
from tests.unit.glm.tiny_glm import EOS, TOKENS, causal_model

PLACE_BYTES = 2 * 3 * 2 * 16 * 4


class TightNetwork(Network):
    """Runs out of memory now and then, but never for one row in the smallest chunks."""

    rng = random.Random(0)
    failures = 0.0

    def _run(self, ids_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        self._allocate(len(ids_T), MIN_CHUNK_TOKENS)
        return super()._run(ids_T, *rest)

    def token_logits(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        self._allocate(len(hidden_RC), 1)
        return super().token_logits(hidden_RC)

    def _allocate(self, size: int, always: int) -> None:
        if size > always and self.rng.random() < self.failures:
            raise torch.OutOfMemoryError("out of memory")


def stop_at_multiple(ids: Sequence[int]) -> bool:
    return sum(ids) % 7 == 0


def requests() -> list[GenerateRequest]:
    """Ten requests; two of them have others beside them, with the same prompt and a longer one."""
    made = _ten()
    rng = random.Random(6)
    for at in (2, 6):
        prompt = [rng.randrange(3, TOKENS) for _ in range(40)]
        first = replace(made[at], prompt_ids=prompt, temperature=1.3)
        beside = [replace(first, index=100 * at + draw, seed=draw) for draw in range(3)]
        ending = [*prompt[:33], *(rng.randrange(3, TOKENS) for _ in range(9))]
        beside.append(replace(first, index=100 * at + 3, prompt_ids=ending, temperature=0.0))
        made[at] = replace(first, beside=tuple(beside if at == 2 else beside[:3]))
    return made


def _ten() -> list[GenerateRequest]:
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
        results: dict[int, GenerateResult] = {}
        for call in self.calls.values():
            while not call.results.empty():
                result = call.results.get()
                assert isinstance(result, GenerateResult)
                assert result.index not in results, "a row is answered once"
                results[result.index] = result
        return results


@pytest.mark.parametrize("ahead", [False, True])
@given(data=st.data())
@settings(
    max_examples=int(os.environ.get("GLM_EXAMPLES", "4")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_any_order_gives_the_answers_of_each_row_alone(
    ahead: bool, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    with on_cuda_path(monkeypatch) if ahead else nullcontext(), torch.inference_mode():
        network, expected = _alone(ahead)
        engine = Engine(
            network,
            slots=data.draw(st.integers(1, 6)),
            budget=data.draw(st.integers(8, 120)),
            places=data.draw(st.integers(110, 400)),
        )
        rng = random.Random(data.draw(st.integers(0, 2**32)))
        network.rng, network.failures = rng, data.draw(st.sampled_from([0, 0, 0.02, 0.1, 0.5]))
        cancelled = data.draw(st.sets(st.integers(0, 9), max_size=3))
        for request in data.draw(st.permutations(requests())):
            engine.push(request)
            for _ in range(rng.choice([0, 0, 1, 5])):
                engine.generation.run_batch()
            if rng.random() < 0.3 and cancelled:
                engine.calls.get(cancelled.pop(), Call()).cancelled = True
            if rng.random() < 0.1:
                engine.generation.preempt()
        results = engine.to_the_end()
    for request in requests():
        for index in (request.index, *(other.index for other in request.beside)):
            if index in results or not engine.calls[request.index].cancelled:
                assert results[index] == expected[index]


_ALONE: dict[bool, tuple[TightNetwork, dict[int, GenerateResult]]] = {}


def _alone(ahead: bool) -> tuple[TightNetwork, dict[int, GenerateResult]]:
    if ahead not in _ALONE:
        network = TightNetwork(causal_model(), TOKENS)
        results: dict[int, GenerateResult] = {}
        for request in requests():
            for alone in (replace(request, beside=()), *request.beside):
                engine = Engine(network, slots=1, budget=512, places=400)
                engine.push(alone)
                results |= engine.to_the_end()
        _ALONE[ahead] = network, results
    network, results = _ALONE[ahead]
    network.failures = 0
    return network, results
