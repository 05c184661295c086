"""The state of one request's sampling: its random numbers, and the ids that are penalized."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.engine.sampler import Sampler, Uniforms
from glmbatch.glm.model.sampling import next_tokens

VOCAB, EOS = 9, 2


def scores_of_transformers(
    request: GenerateRequest, ids: list[int], logits_1V: torch.Tensor
) -> torch.Tensor:
    """The scores after transformers' own processors, in the order of its `generate`."""
    seen_1T = torch.tensor([[*request.prompt_ids, *ids]])
    processors = [
        RepetitionPenaltyLogitsProcessor(request.repetition_penalty),
        NoRepeatNGramLogitsProcessor(request.no_repeat_ngram_size or 1000),
        MinNewTokensLengthLogitsProcessor(len(request.prompt_ids), request.min_tokens, EOS),
    ]
    for processor in processors:
        logits_1V = processor(seen_1T, logits_1V)  # type: ignore[no-untyped-call]
    return logits_1V


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    size=st.sampled_from([0, 2, 3, 5]),
    minimum=st.integers(0, 12),
)
def test_each_token_has_the_scores_of_transformers(
    seed: int, prompt: list[int], penalty: float, size: int, minimum: int
) -> None:
    request = GenerateRequest(
        0,
        prompt,
        12,
        repetition_penalty=penalty,
        no_repeat_ngram_size=size,
        min_tokens=minimum,
    )
    sampler = Sampler(request, EOS)
    generator, ids = torch.Generator().manual_seed(seed), []
    uniforms = [(at + 0.5) / 200 for at in range(200)]
    for _ in range(12):
        logits_1V = torch.randn(1, VOCAB, generator=generator)
        expected_V = scores_of_transformers(request, ids, logits_1V)[0]
        if expected_V.isinf().all():
            break
        greedy = sampler.at(0, ids)
        # As a row of a batch with greedy rows, and all its probabilities.
        rows = [
            greedy._replace(row=at, temperature=1.0, uniform=u) for at, u in enumerate(uniforms)
        ]
        tokens = next_tokens(logits_1V.expand(201, -1), [*rows, greedy._replace(row=200)]).tokens_R
        shares_V = torch.bincount(tokens[:200], minlength=VOCAB) / 200
        assert torch.allclose(shares_V, expected_V.softmax(-1), atol=2 / 200)
        assert tokens[200] == expected_V.argmax()
        ids.append(int(tokens[200]))


def test_a_plain_greedy_request_needs_no_sampler() -> None:
    assert Sampler.of(GenerateRequest(0, [5], 3, log_probs=True), EOS) is None
    assert Sampler.of(GenerateRequest(0, [5], 3, min_tokens=1), EOS) is not None


@given(st.lists(st.integers(0, 5), max_size=40), st.data())
def test_a_sampler_may_skip_and_repeat_tokens(ids: list[int], data: st.DataObject) -> None:
    request = GenerateRequest(
        0, [3, 1, 3], 40, repetition_penalty=2.0, no_repeat_ngram_size=2, min_tokens=3
    )
    sampler = Sampler(request, EOS)
    counts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    for count in counts:
        how, fresh = (one.at(0, ids[:count]) for one in (sampler, Sampler(request, EOS)))
        assert (how.barred_ids, how.uniform) == (fresh.barred_ids, fresh.uniform)
        assert how.penalized_ids is not None and fresh.penalized_ids is not None
        assert how.penalized_ids.tolist() == fresh.penalized_ids.tolist()


@given(seed=st.integers(0, 2**64 - 1))
def test_uniforms_depend_on_seed_and_index_only(seed: int) -> None:
    forward, backward = Uniforms(seed), Uniforms(seed)
    numbers = [forward.number(n) for n in range(130)]
    assert [backward.number(n) for n in reversed(range(130))] == numbers[::-1]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 130
    assert Uniforms(seed ^ 1).number(0) != numbers[0]


def test_uniforms_equal_those_of_earlier_releases() -> None:
    assert [Uniforms(7).number(n) * 2**32 for n in (0, 1, 64)] == [
        3745526968,
        1268584653,
        1130523808,
    ]
