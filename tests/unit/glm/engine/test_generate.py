"""Continuous batching generates the tokens of a plain loop, for any slots, budget and order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from glmbatch.errors import InputError
from glmbatch.glm.engine.protocol import GenerateRequest, GenerateResult
from glmbatch.glm.engine.worker import TorchEngine
from tests.unit.glm.tiny_glm import (
    EOS,
    NOT_A_NUMBER,
    POSITIONS,
    TOKENS,
    VOCAB,
    causal_model,
    engine_over,
    head_model,
    plain_greedy,
    plain_logits,
    prompts,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return causal_model()


def generate(engine: TorchEngine, requests: Sequence[GenerateRequest]) -> dict[int, GenerateResult]:
    results = {result.index: result for result in engine.generate(requests)}
    assert len(results) == len(requests)
    return results


def greedy_requests(count: int = 24) -> list[GenerateRequest]:
    return [
        GenerateRequest(at, row, max_tokens=1 + at % 13)
        for at, row in enumerate(prompts(count, longest=40))
    ]


def sampled_requests(count: int = 24) -> list[GenerateRequest]:
    """Requests of which every third is greedy; the others have various sampling settings."""
    return [
        dataclasses.replace(
            request,
            temperature=(0.0, 0.9, 2.0)[request.index % 3],
            top_k=(0, 20, 0, 5)[request.index % 4],
            top_p=(1.0, 0.8)[request.index % 2],
            seed=2**63 + request.index,
        )
        for request in greedy_requests(count)
    ]


@pytest.mark.parametrize("prefix_places", [0, 5])
@pytest.mark.parametrize(("slots", "budget"), [(1, 16), (5, 100), (32, 2048)])
def test_greedy_tokens_equal_the_plain_loop(slots: int, budget: int, prefix_places: int) -> None:
    model, requests = causal_model(prefix_places), greedy_requests(16)
    with engine_over(model, max_slots=slots, max_batch_tokens=budget) as engine:
        results = generate(engine, requests)
    for request in requests:
        result = results[request.index]
        assert (result.ids, result.finish_reason) == plain_greedy(
            model, request.prompt_ids, request.max_tokens
        )


def test_sampled_tokens_depend_on_the_request_only(model: Any) -> None:
    requests = sampled_requests()
    with engine_over(model, max_slots=1) as engine:
        expected = generate(engine, requests)
    assert len({result.ids for result in expected.values()}) > len(requests) / 2
    for slots, budget in [(2, 64), (7, 300), (32, 2048)]:
        with engine_over(model, max_slots=slots, max_batch_tokens=budget) as engine:
            assert generate(engine, requests) == expected
            assert generate(engine, requests[::-1]) == expected
            assert generate(engine, requests[5:6]) == {5: expected[5]}


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_tokens": 25},
        {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_tokens": 5},
    ],
)
def test_penalties_give_the_tokens_of_transformers(model: Any, changes: dict[str, Any]) -> None:
    requests = [
        GenerateRequest(at, row, 30, log_probs=at % 2 == 0, **changes)
        for at, row in enumerate(prompts(8, longest=30))
    ]
    with engine_over(model, max_slots=3, max_batch_tokens=64) as engine:
        results = generate(engine, requests)
    names = {"min_tokens": "min_new_tokens"}
    settings = {names.get(name, name): value for name, value in changes.items()}
    for request in requests:
        result = results[request.index]
        output = model.generate(
            torch.tensor([request.prompt_ids]),
            max_new_tokens=30,
            do_sample=False,
            suppress_tokens=list(range(TOKENS, VOCAB)),
            **settings,
        )
        ended = [EOS] if result.finish_reason == "stop" else []
        assert [*request.prompt_ids, *result.ids, *ended] == output[0].tolist()
        assert len(result.log_probs) == (len(result.ids) if request.log_probs else 0)


def test_log_probabilities_are_those_of_one_forward(model: Any) -> None:
    requests = [
        dataclasses.replace(request, log_probs=True, repetition_penalty=1.2)
        for request in sampled_requests(6)
    ]
    with engine_over(model, max_slots=2) as engine:
        results = generate(engine, requests)
    for request in requests:
        result = results[request.index]
        logits = plain_logits(model, [*request.prompt_ids, *result.ids])
        rows = logits[len(request.prompt_ids) - 1 :].log_softmax(-1)
        expected = [float(rows[at, token]) for at, token in enumerate(result.ids)]
        assert result.log_probs == pytest.approx(expected, abs=1e-4)


def test_another_seed_draws_other_tokens(model: Any) -> None:
    first, second = (GenerateRequest(0, [5, 6], 30, temperature=1.5, seed=seed) for seed in (1, 2))
    with engine_over(model) as engine:
        assert generate(engine, [first])[0].ids != generate(engine, [second])[0].ids


@pytest.mark.parametrize("prefix_places", [0, 5])
def test_a_shared_template_changes_no_token(prefix_places: int) -> None:
    model = causal_model(prefix_places)
    template = (prompts(1, seed=5)[0] * 20)[:40]
    rows = [[*template, *row] for row in prompts(10, longest=20)]
    requests = [GenerateRequest(at, row, 8, shared_tokens=40) for at, row in enumerate(rows)]
    with engine_over(model, max_slots=4, max_batch_tokens=60) as engine:
        results = generate(engine, requests)
    for request in requests:
        assert results[request.index].ids == plain_greedy(model, request.prompt_ids, 8)[0]


def test_the_end_token_ends_an_answer_and_is_omitted(model: Any) -> None:
    requests = [
        GenerateRequest(at, row, 60, temperature=1.5, seed=at) for at, row in enumerate(prompts(30))
    ]
    with engine_over(model) as engine:
        results = generate(engine, requests)
    reasons = {result.finish_reason for result in results.values()}
    assert reasons == {"stop", "length"}
    for result in results.values():
        assert (len(result.ids) == 60) == (result.finish_reason == "length")
        assert all(0 <= token < TOKENS and token != 2 for token in result.ids)


def test_should_stop_sees_all_ids_and_ends_the_answer(model: Any) -> None:
    row, calls = [5, 6, 7], []

    def should_stop(ids: Sequence[int]) -> bool:
        calls.append(tuple(ids))
        return len(ids) == 4

    with engine_over(model) as engine:
        result = generate(engine, [GenerateRequest(0, row, 20, should_stop=should_stop)])[0]
    written, _ = plain_greedy(model, row, 20)
    assert result == GenerateResult(0, written[:4], "stop")
    assert calls == [written[:count] for count in range(1, 5)]


def test_an_error_in_should_stop_reaches_its_caller_only(model: Any) -> None:
    def should_stop(ids: Sequence[int]) -> bool:
        raise LookupError("mine")

    with engine_over(model) as engine:
        other = engine.generate([GenerateRequest(0, [5, 6], 20)])
        with pytest.raises(LookupError, match="mine"):
            list(engine.generate([GenerateRequest(0, [5], 20, should_stop=should_stop)]))
        assert len(list(other)) == 1


def test_an_answer_ends_at_the_last_position(model: Any) -> None:
    rows = [[5, 6, 7] * POSITIONS for _ in range(4)]
    requests = [GenerateRequest(at, row[: POSITIONS - at], 50) for at, row in enumerate(rows)]
    with engine_over(model, max_slots=2) as engine:
        results = generate(engine, requests)
    for request in requests:
        result = results[request.index]
        assert (result.ids, result.finish_reason) == plain_greedy(model, request.prompt_ids, 50)
        assert len(result.ids) <= request.index


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [([], "no tokens"), ([5] * (POSITIONS + 1), "positions"), ([5, 160], "outside the model's")],
)
def test_an_invalid_request_fails_alone(model: Any, prompt: list[int], reason: str) -> None:
    with engine_over(model) as engine:
        results = generate(engine, [GenerateRequest(0, prompt, 3), GenerateRequest(1, [5], 3)])
    assert reason in (results[0].error or "")
    assert (results[0].ids, results[0].finish_reason) == ((), "error")
    assert results[1].error is None


def test_a_non_finite_row_fails_alone(model: Any) -> None:
    requests = greedy_requests()
    spoiled = [
        dataclasses.replace(request, prompt_ids=[*request.prompt_ids, NOT_A_NUMBER] * 3)
        if request.index % 6 == 1
        else request
        for request in requests
    ]
    with engine_over(model, max_slots=3) as engine:
        expected, results = generate(engine, requests), generate(engine, spoiled)
        assert generate(engine, requests) == expected
    for index, result in results.items():
        if index % 6 == 1:
            assert (result.ids, result.finish_reason) == ((), "error")
            assert "not finite" in (result.error or "")
        else:
            assert result == expected[index]


def test_a_longer_cache_has_fewer_slots(model: Any) -> None:
    place_bytes = 2 * 3 * 2 * 16 * 4
    requests = [
        GenerateRequest(0, [5, 6, 7] * 20, 120),
        *(GenerateRequest(at, row, 70) for at, row in enumerate(prompts(9, longest=30), start=1)),
    ]
    with engine_over(model, max_slots=8, cache_bytes=place_bytes * 64 * 8) as engine:
        results = generate(engine, requests)
    for request in requests:
        expected = plain_greedy(model, request.prompt_ids, request.max_tokens)
        assert (results[request.index].ids, results[request.index].finish_reason) == expected


def test_a_checkpoint_with_a_trained_head_cannot_generate() -> None:
    with engine_over(head_model()) as engine, pytest.raises(InputError, match="cannot generate"):
        list(engine.generate([GenerateRequest(0, [5], 3)]))


def test_penalties_pass_over_padding_ids_in_the_prompt(model: Any) -> None:
    changes: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1}
    with engine_over(model) as engine:
        result = generate(engine, [GenerateRequest(0, [5, TOKENS + 1, 6], 20, **changes)])[0]
    assert len(result.ids) == 20 or result.finish_reason == "stop"
    assert len(set(result.ids)) == len(result.ids)
