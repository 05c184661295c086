"""The next token of each row from its scores. Knows no sequences: each row brings its own settings and uniform number.

Shapes: R rows, V tokens, K candidates that could pass a row's cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Stands for a row whose scores are not finite.
NOT_FINITE = -1


class Uniforms:
    """The uniform numbers of one request, from a counter-based generator keyed by its seed.

    Number n is the same whenever it is asked for, so a token tried again after a failure draws the same.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed & (2**64 - 1))
        self._numbers: list[float] = []

    def number(self, n: int) -> float:
        """Number n of [0, 1). 32 bits, so that times a float64 sum it stays below that sum."""
        while n >= len(self._numbers):
            self._numbers += ((self._bits.random_raw(64) >> np.uint64(32)) * 2.0**-32).tolist()
        return self._numbers[n]


@dataclass(frozen=True, slots=True)
class Draw:
    """How to sample one row: settings as in `GenerateRequest`, and the uniform number that decides."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    uniform: float


def next_tokens(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each row: sampled for the rows of `draws`, the likeliest for all others.

    NOT_FINITE for a row whose float32 logits hold a nan or an infinity. One read from the device.
    """
    finite_R = logits_RV.sum(-1).isfinite()
    tokens_R = logits_RV.argmax(-1)
    if draws:
        rows_R = torch.tensor([draw.row for draw in draws], device=logits_RV.device)
        scores_RV = logits_RV if len(draws) == len(logits_RV) else logits_RV[rows_R]
        tokens_R[rows_R] = _sample(scores_RV, draws)
    return torch.where(finite_R, tokens_R, NOT_FINITE).tolist()


def _sample(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Temperature, then top_k, then top_p, then the inverse of the cumulative distribution in the order of ids.

    Cuts are made by value, not by rank: tokens of equal score stay or go together, so that ties, common in bfloat16,
    are not settled by the order a sort happened to leave.
    """
    settings_R4 = [[draw.temperature, draw.top_k, draw.top_p, draw.uniform] for draw in draws]
    temperature_R1, top_k_R1, top_p_R1, uniform_R1 = (
        torch.tensor(settings_R4, dtype=torch.float64).to(logits_RV.device).T.unsqueeze(-1)
    )
    # The greatest becomes 0, so that a tiny temperature overflows to -inf and never to nan.
    logits_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R1.clamp(
        min=1e-30
    ).float()
    if most := max(draw.top_k for draw in draws):
        best_RK = logits_RV.topk(_at_most(logits_RV, most)).values
        logits_RV = logits_RV.masked_fill(
            logits_RV < _top_k_floor(best_RK, top_k_R1.long()), -torch.inf
        )
    probs_RV = logits_RV.softmax(-1)
    cut = [draw.top_k for draw in draws if draw.top_p < 1]
    if cut:
        # All candidates of a row with a top_k are among its top_k; the full sort is for rows without one.
        ranked_RK = probs_RV.topk(_at_most(probs_RV, max(cut) if all(cut) else None)).values
        probs_RV = probs_RV.masked_fill(probs_RV < _top_p_floor(ranked_RK, top_p_R1), 0.0)
    cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    # The first token whose sum is above the target has a probability above 0.
    return torch.searchsorted(
        cumulative_RV, uniform_R1 * cumulative_RV[:, -1:], right=True
    ).squeeze(-1)


def _at_most(scores_RV: torch.Tensor, count: int | None) -> int:
    vocab = scores_RV.shape[-1]
    return vocab if count is None else min(count, vocab)


def _top_k_floor(best_RK: torch.Tensor, top_k_R1: torch.Tensor) -> torch.Tensor:
    """The smallest score each row keeps; -inf where its top_k is 0."""
    kth_R1 = best_RK.gather(1, (top_k_R1 - 1).clamp(0, best_RK.shape[-1] - 1))
    return kth_R1.masked_fill(top_k_R1 == 0, -torch.inf)


def _top_p_floor(ranked_RK: torch.Tensor, top_p_R1: torch.Tensor) -> torch.Tensor:
    """The smallest probability each row keeps: a token stays while those above it sum to less than top_p."""
    above_RK = ranked_RK.cumsum(-1, dtype=torch.float64) - ranked_RK
    kept_R1 = (above_RK < top_p_R1).sum(-1, keepdim=True).clamp(min=1)
    return ranked_RK.gather(1, kept_R1 - 1).masked_fill(top_p_R1 >= 1, 0.0)
