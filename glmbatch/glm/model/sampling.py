"""Chooses the next token of each row from its logits: greedy, or with temperature, top-k and top-p.

Knows no sequences: each row has its own settings and its own uniform number.

Shapes: R rows, V tokens, K candidates that may survive a row's top-k or top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Returned instead of a token for a row whose logits are not finite.
NOT_FINITE = -1


class Uniforms:
    """The uniform random numbers of one request, from a counter-based generator with its seed.

    The generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    Number n is always the same, so that a token is the same when it is drawn again after a failure.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed & (2**64 - 1))
        self._numbers: list[float] = []

    def number(self, n: int) -> float:
        """Number n, in [0, 1), a multiple of 2^-32."""
        while n >= len(self._numbers):
            # With 32 bits, a float64 sum times such a number stays below that sum.
            self._numbers += ((self._bits.random_raw(64) >> np.uint64(32)) * 2.0**-32).tolist()
        return self._numbers[n]


@dataclass(frozen=True, slots=True)
class Draw:
    """How to sample one row: the settings of its `GenerateRequest` and a uniform number."""

    row: int
    temperature: float
    top_k: int
    top_p: float
    uniform: float


def next_tokens(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each row: sampled for the rows in `draws`, the likeliest for all others.

    NOT_FINITE for a row with a nan or an infinity in its float32 logits. Waits for the device once.
    """
    # A sum is finite only if every number is, and it needs no mask of the size of the logits.
    finite_R = logits_RV.sum(-1).isfinite()
    tokens_R = logits_RV.argmax(-1)
    if draws:
        rows_R = torch.tensor([draw.row for draw in draws], device=logits_RV.device)
        scores_RV = logits_RV if len(draws) == len(logits_RV) else logits_RV[rows_R]
        tokens_R[rows_R] = _sample(scores_RV, draws)
    return torch.where(finite_R, tokens_R, NOT_FINITE).tolist()


def _sample(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """One token for each row: temperature, top_k, top_p, then the inverse cumulative distribution.

    top_k and top_p cut by value, not by rank: tokens of equal score are kept or removed together.
    Otherwise ties, which are common in bfloat16, would depend on the order of a sort.
    """
    settings_R4 = [[draw.temperature, draw.top_k, draw.top_p, draw.uniform] for draw in draws]
    temperature_R1, top_k_R1, top_p_R1, uniform_R1 = (
        torch.tensor(settings_R4, dtype=torch.float64).to(logits_RV.device).T.unsqueeze(-1)
    )
    # The maximum becomes 0, so that a tiny temperature overflows to -inf and never to nan.
    logits_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    logits_RV = logits_RV / temperature_R1.clamp(min=1e-30).float()
    vocab = logits_RV.shape[-1]
    max_top_k = max(draw.top_k for draw in draws)
    if max_top_k:
        best_RK = logits_RV.topk(min(max_top_k, vocab)).values
        floor_R1 = _top_k_floor(best_RK, top_k_R1.long())
        logits_RV = logits_RV.masked_fill(logits_RV < floor_R1, -torch.inf)
    probs_RV = logits_RV.softmax(-1)
    top_ks = [draw.top_k for draw in draws if draw.top_p < 1]
    if top_ks:
        # With top_k, only that many tokens can be candidates; rows without it need a full sort.
        candidates = min(max(top_ks), vocab) if all(top_ks) else vocab
        ranked_RK = probs_RV.topk(candidates).values
        probs_RV = probs_RV.masked_fill(probs_RV < _top_p_floor(ranked_RK, top_p_R1), 0.0)
    cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    targets_R1 = uniform_R1 * cumulative_RV[:, -1:]
    # The first token whose cumulative sum exceeds the target has a probability above 0.
    return torch.searchsorted(cumulative_RV, targets_R1, right=True).squeeze(-1)


def _top_k_floor(best_RK: torch.Tensor, top_k_R1: torch.Tensor) -> torch.Tensor:
    """The smallest logit [R, 1] that each row keeps; -inf where its top_k is 0."""
    kth_R1 = best_RK.gather(1, (top_k_R1 - 1).clamp(0, best_RK.shape[-1] - 1))
    return kth_R1.masked_fill(top_k_R1 == 0, -torch.inf)


def _top_p_floor(ranked_RK: torch.Tensor, top_p_R1: torch.Tensor) -> torch.Tensor:
    """The smallest probability [R, 1] that each row keeps.

    A token is kept if the probabilities above it sum to less than top_p.
    """
    above_RK = ranked_RK.cumsum(-1, dtype=torch.float64) - ranked_RK
    kept_R1 = (above_RK < top_p_R1).sum(-1, keepdim=True).clamp(min=1)
    return ranked_RK.gather(1, kept_R1 - 1).masked_fill(top_p_R1 >= 1, 0.0)
