"""Sampling: which tokens can be drawn, how often, and what a draw may depend on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from glmbatch.glm.model.sampling import NOT_FINITE, RowSampling, next_tokens

VOCAB = 40


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def kept_by_transformers(logits_V: torch.Tensor, draw: RowSampling) -> torch.Tensor:
    """Probabilities after transformers' own logits warpers, in its order."""
    scores = TemperatureLogitsWarper(draw.temperature)(None, logits_V[None])
    if draw.top_k:
        scores = TopKLogitsWarper(draw.top_k)(None, scores)
    if draw.top_p < 1:
        scores = TopPLogitsWarper(draw.top_p)(None, scores)
    probs: torch.Tensor = scores.softmax(-1)[0]
    return probs


def tokens_of(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
    tokens: list[int] = next_tokens(logits_RV, rows).tokens_R.tolist()
    return tokens


def draw_many(logits_V: torch.Tensor, draw: RowSampling, count: int) -> torch.Tensor:
    """The share of each token among draws with `count` evenly spaced uniform numbers."""
    draws = [draw._replace(row=at, uniform=(at + 0.5) / count) for at in range(count)]
    tokens = tokens_of(logits_V.expand(count, -1), draws)
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB) / count


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 2, 10, VOCAB, 500]),
    top_p=st.sampled_from([0.01, 0.3, 0.8, 0.95, 1.0]),
)
def test_draws_follow_the_distribution_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits_V, draw = random_logits(1, seed)[0], RowSampling(0, temperature, top_k, top_p, 0.0)
    expected = kept_by_transformers(logits_V, draw)
    drawn = draw_many(logits_V, draw, 2000)
    assert not drawn[expected == 0].any()
    assert torch.allclose(drawn, expected, atol=2 / 2000)


def test_a_token_that_was_cut_is_never_drawn() -> None:
    logits_V = random_logits(1)[0]
    likeliest = int(logits_V.argmax())
    for uniform in (0.0, 0.5, 1 - 2.0**-32):
        for draw in (
            RowSampling(0, 1.0, 1, 1.0, uniform),
            RowSampling(0, 1.0, 0, 1e-9, uniform),
            RowSampling(0, 1e-40, 0, 1.0, uniform),
        ):
            assert tokens_of(logits_V[None], [draw]) == [likeliest]


def test_equal_logits_at_a_cut_are_kept_together() -> None:
    logits_V = torch.zeros(VOCAB)
    logits_V[[3, 7, 9]] = 5.0
    assert set(
        draw_many(logits_V, RowSampling(0, 1.0, 2, 1.0, 0.0), 300).nonzero().flatten().tolist()
    ) == {3, 7, 9}
    assert set(
        draw_many(logits_V, RowSampling(0, 1.0, 3, 0.3, 0.0), 300).nonzero().flatten().tolist()
    ) == {3, 7, 9}


def plain_token(logits_V: torch.Tensor, how: RowSampling) -> int:
    """The token of a sort and of one cumulative sum over all tokens, in float64."""
    probs_V = (logits_V / how.temperature).softmax(-1)
    ranked_V = probs_V.double().sort(descending=True).values
    kept = int((ranked_V.cumsum(0) - ranked_V < how.top_p).sum())
    probs_V = probs_V.masked_fill(probs_V < ranked_V[kept - 1], 0.0)
    cumulative_V = probs_V.double().cumsum(0)
    return int((cumulative_V <= how.uniform * cumulative_V[-1]).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.9999999])
def test_all_ways_to_cut_at_top_p_draw_the_same_token(
    dtype: torch.dtype, spread: float, top_p: float
) -> None:
    vocab = 33_000  # over so many a histogram finds the cut
    generator = torch.Generator().manual_seed(3)
    logits_RV = (torch.randn(12, vocab, generator=generator) * spread).to(dtype).float()
    rows = [RowSampling(row, 1.0, 0, top_p, (row + 0.37) / 12) for row in range(12)]
    expected = [plain_token(*pair) for pair in zip(logits_RV, rows, strict=True)]
    assert tokens_of(logits_RV, rows) == expected
    assert tokens_of(logits_RV, [row._replace(top_k=vocab) for row in rows]) == expected
    few = [plain_token(*pair) for pair in zip(logits_RV[:, :700], rows, strict=True)]
    assert tokens_of(logits_RV[:, :700], rows) == few


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 8), data=st.data())
@settings(deadline=None)
def test_a_row_is_drawn_the_same_in_any_batch(seed: int, rows: int, data: st.DataObject) -> None:
    logits_RV = random_logits(rows, seed)
    draws = [
        RowSampling(
            row,
            data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            data.draw(st.sampled_from([0, 3, 20])),
            data.draw(st.sampled_from([0.7, 1.0])),
            data.draw(st.floats(0, 1, exclude_max=True)),
        )
        for row in range(rows)
        if data.draw(st.booleans())
    ]
    together = tokens_of(logits_RV, draws)
    by_row = {draw.row: draw for draw in draws}
    for row in range(rows):
        alone = [by_row[row]._replace(row=0)] if row in by_row else []
        assert tokens_of(logits_RV[row : row + 1], alone) == [together[row]]


def test_rows_without_a_draw_are_greedy() -> None:
    logits_RV = random_logits(3)
    tokens = tokens_of(logits_RV, [RowSampling(1, 5.0, 0, 1.0, 0.999)])
    assert [tokens[0], tokens[2]] == logits_RV.argmax(-1)[[0, 2]].tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("top_k", [None, 5, 0])
def test_a_non_finite_row_is_marked_and_affects_no_other(bad: float, top_k: int | None) -> None:
    logits_RV = random_logits(3)
    draws = [] if top_k is None else [RowSampling(row, 1.0, top_k, 0.9, 0.4) for row in range(3)]
    expected = next_tokens(logits_RV, draws, log_probs=True)
    logits_RV[1, 6] = bad
    chosen = next_tokens(logits_RV, draws, log_probs=True)
    assert chosen.tokens_R.tolist() == [expected.tokens_R[0], NOT_FINITE, expected.tokens_R[2]]
    assert expected.log_probs_R is not None and chosen.log_probs_R is not None
    assert torch.equal(chosen.log_probs_R[::2], expected.log_probs_R[::2])


def test_log_probabilities_are_those_of_the_model() -> None:
    logits_RV = random_logits(4)
    barred = int(logits_RV[1].argmax())
    rows = [
        RowSampling(0, 2.0, 3, 0.5, 0.7),
        RowSampling(1, barred_ids=[barred]),
        RowSampling(2, 1.0, repetition_penalty=3.0, penalized_ids=np.arange(20)),
    ]
    chosen = next_tokens(logits_RV, rows, log_probs=True)
    assert chosen.tokens_R[1] != barred
    expected_R = logits_RV.log_softmax(-1).gather(1, chosen.tokens_R[:, None])[:, 0]
    assert torch.allclose(chosen.log_probs_R, expected_R)  # type: ignore[arg-type]
    assert next_tokens(logits_RV, rows).log_probs_R is None


def test_log_probabilities_are_among_the_allowed_tokens() -> None:
    logits_RV = random_logits(2)
    allowed = [1, 8, 9]
    mask = np.zeros(16, dtype=np.uint8)
    mask[allowed] = 1
    row = RowSampling(1, allowed=np.packbits(mask, bitorder="little").tobytes())
    chosen = next_tokens(logits_RV, [row], log_probs=True)
    assert chosen.log_probs_R is not None
    assert int(chosen.tokens_R[1]) in allowed
    expected = logits_RV[0].log_softmax(-1).amax(), logits_RV[1, allowed].log_softmax(-1).amax()
    assert torch.allclose(chosen.log_probs_R, torch.stack(expected))
