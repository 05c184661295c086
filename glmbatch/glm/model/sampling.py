"""Chooses the next token of each row from its logits: greedy, or with temperature, top-k and top-p.

Knows no sequences: each row has its own settings and its own uniform number.

Shapes: R rows, V tokens, K candidates that may survive a row's top-k or top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

# Returned instead of a token for a row whose logits are not finite.
NOT_FINITE = -1

IdArray = npt.NDArray[np.int64]


class RowSampling(NamedTuple):
    """How to choose the next token of one row that is not plain greedy.

    `temperature` 0 is greedy. `penalized_ids` are those whose scores `repetition_penalty` lowers;
    repeats among them have no effect. The `barred_ids` cannot be chosen.
    """

    row: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.0
    repetition_penalty: float = 1.0
    penalized_ids: IdArray | None = None
    barred_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of each row, and its log-probability where that was asked for.

    The tensors are on the device of the logits, and may not be computed yet.
    """

    # int64; NOT_FINITE for a row with a nan or an infinity in its logits.
    tokens_R: torch.Tensor
    # float32, natural logarithm.
    log_probs_R: torch.Tensor | None = None


def next_tokens(
    logits_RV: torch.Tensor, rows: Sequence[RowSampling], log_probs: bool = False
) -> Chosen:
    """The next token of each row: as `rows` say, and the likeliest for all other rows.

    A log-probability is that of the chosen token under the model's own distribution: before
    penalties, temperature and cuts. Never waits for the device.
    """
    # A sum is finite only if every number is, and it needs no mask of the size of the logits.
    finite_R = logits_RV.sum(-1).isfinite()
    tokens_R = logits_RV.argmax(-1)
    draws = [row for row in rows if row.temperature > 0]
    if draws:
        rows_R = _on_device(np.array([draw.row for draw in draws]), logits_RV.device)
        scores_RV = logits_RV if len(draws) == len(logits_RV) else logits_RV[rows_R]
        tokens_R[rows_R] = _sample(scores_RV, draws)
    log_probs_R = None
    if log_probs:
        chosen_R = logits_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
        log_probs_R = chosen_R - logits_RV.logsumexp(-1)
    return Chosen(torch.where(finite_R, tokens_R, NOT_FINITE), log_probs_R)


def _on_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor of `values` on `device`, which is not waited for."""
    values_N = torch.from_numpy(values)
    if device.type == "cuda":  # a copy from memory that is not pinned waits for earlier work
        return values_N.pin_memory().to(device, non_blocking=True)
    return values_N.to(device)


def _sample(logits_RV: torch.Tensor, draws: Sequence[RowSampling]) -> torch.Tensor:
    """One token for each row: temperature, top_k, top_p, then the inverse cumulative distribution.

    top_k and top_p cut by value, not by rank: tokens of equal score are kept or removed together.
    Otherwise ties, which are common in bfloat16, would depend on the order of a sort.
    """
    _, *settings = zip(*(draw[:5] for draw in draws), strict=True)
    settings_4R = _on_device(np.array(settings, dtype=np.float64), logits_RV.device)
    temperature_R1, top_k_R1, top_p_R1, uniform_R1 = settings_4R.unsqueeze(-1)
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
