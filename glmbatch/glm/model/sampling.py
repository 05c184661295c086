"""Chooses the next token of each row from its logits: greedy, or with temperature, top-k and top-p.

Knows no sequences: each row has its own settings and its own uniform number.

Shapes: R rows, V tokens, K candidates that may survive a row's top-k or top-p,
N rows with a mask, W bytes of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from glmbatch.glm.model.rows import to_device

# Returned instead of a token for a row whose logits are not finite.
NOT_FINITE = -1

# A probability of 1 as an integer. A float32 above 2^-36 keeps all its bits.
ONE = 2.0**60
# Half of the 30 bits of a float32 of at most 1.
HALF = 15
HALF_MASK = 2**HALF - 1
# The tokens that `_draw` sums at once.
BLOCK = 256

IdArray = npt.NDArray[np.int64]


class RowSampling(NamedTuple):
    """How to choose the next token of one row that is not plain greedy.

    `temperature` 0 is greedy. `penalized_ids` are those whose scores `repetition_penalty` lowers;
    repeats among them have no effect. The `barred_ids` cannot be chosen. `allowed` has one bit for
    each token, the lowest bit first: tokens with a 0, or without a bit, cannot be chosen.
    """

    row: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniform: float = 0.0
    repetition_penalty: float = 1.0
    penalized_ids: IdArray | None = None
    barred_ids: Sequence[int] = ()
    allowed: bytes | None = None


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

    A log-probability is that of the chosen token under the model's own distribution over the
    allowed tokens: before penalties, temperature and cuts. Never waits for the device.
    """
    # A sum is finite only if every number is, and it needs no mask of the size of the logits.
    finite_R = logits_RV.sum(-1).isfinite()
    logits_RV = _restrict(logits_RV, rows)
    scores_RV = _penalize(logits_RV, rows)
    tokens_R = scores_RV.argmax(-1)
    draws = [row for row in rows if row.temperature > 0]
    if draws:
        (rows_R,) = to_device(logits_RV.device, np.array([draw.row for draw in draws]))
        if len(draws) < len(logits_RV):
            scores_RV = scores_RV[rows_R]
        tokens_R[rows_R] = _sample(scores_RV, draws)
    log_probs_R = None
    if log_probs:
        chosen_R = logits_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
        log_probs_R = chosen_R - logits_RV.logsumexp(-1)
    return Chosen(torch.where(finite_R, tokens_R, NOT_FINITE), log_probs_R)


def _restrict(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """The logits with -inf at the tokens that are not allowed; the same tensor if all are."""
    masks = {row.row: row.allowed for row in rows if row.allowed is not None}
    if not masks:
        return logits_RV
    bits = np.zeros((len(masks), -(-logits_RV.shape[1] // 8)), dtype=np.uint8)
    for mask, row in zip(masks.values(), bits, strict=True):
        known = np.frombuffer(mask, dtype=np.uint8)[: len(row)]
        row[: len(known)] = known
    (rows_N,) = to_device(logits_RV.device, np.array(list(masks)))
    (bits_NW,) = to_device(logits_RV.device, bits)
    places_8 = torch.arange(8, device=logits_RV.device, dtype=torch.uint8)
    allowed_NW8 = bits_NW.unsqueeze(-1).bitwise_right_shift(places_8).bitwise_and_(1).bool()
    allowed_NV = allowed_NW8.flatten(1)[:, : logits_RV.shape[1]]
    scores_RV = logits_RV.clone()
    scores_RV[rows_N] = logits_RV[rows_N].masked_fill(~allowed_NV, -torch.inf)
    return scores_RV


def _penalize(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """The logits after the repetition penalties of `rows`, with their barred ids at -inf.

    The same tensor if no row has either. Ids without a score, which are padding of the vocabulary,
    are passed over: a prompt may have them.
    """
    vocab = logits_RV.shape[1]
    penalized = [row for row in rows if row.penalized_ids is not None]
    barred: list[tuple[int, int]] = []
    for row in rows:
        barred += [(row.row, token) for token in row.barred_ids if token < vocab]
    if not penalized and not barred:
        return logits_RV
    scores_RV = logits_RV.clone()
    if penalized:
        ids = [row.penalized_ids for row in penalized if row.penalized_ids is not None]
        ids = [array[array < vocab] for array in ids]
        at = np.repeat([row.row for row in penalized], [len(array) for array in ids])
        penalties = np.ones(len(logits_RV), dtype=np.float32)
        penalties[[row.row for row in penalized]] = [row.repetition_penalty for row in penalized]
        rows_N, ids_N = to_device(logits_RV.device, at, np.concatenate(ids))
        (penalties_R,) = to_device(logits_RV.device, penalties)
        penalties_N = penalties_R[rows_N]
        seen_N = scores_RV[rows_N, ids_N]
        scores_RV[rows_N, ids_N] = torch.where(
            seen_N < 0, seen_N * penalties_N, seen_N / penalties_N
        )
    if barred:
        rows_N, ids_N = to_device(logits_RV.device, *np.array(barred).T)
        scores_RV[rows_N, ids_N] = -torch.inf
    return scores_RV


def _sample(logits_RV: torch.Tensor, draws: Sequence[RowSampling]) -> torch.Tensor:
    """One token for each row: temperature, top_k, top_p, then the inverse cumulative distribution.

    top_k and top_p cut by value, not by rank: tokens of equal score are kept or removed together.
    Otherwise ties, which are common in bfloat16, would depend on the order of a sort.
    """
    _, *settings = zip(*(draw[:5] for draw in draws), strict=True)
    (settings_4R,) = to_device(logits_RV.device, np.array(settings, dtype=np.float64))
    temperature_R1, top_k_R1, top_p_R1, uniform_R1 = settings_4R.unsqueeze(-1)
    # The maximum becomes 0, so that a tiny temperature overflows to -inf and never to nan.
    logits_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    logits_RV /= temperature_R1.clamp(min=1e-30).float()
    max_top_k = min(max(draw.top_k for draw in draws), logits_RV.shape[-1])
    if max_top_k:
        best_RK, best_ids_RK = logits_RV.topk(max_top_k)
        logits_RV.masked_fill_(logits_RV < _top_k_floor(best_RK, top_k_R1.long()), -torch.inf)
    probs_RV = logits_RV.softmax(-1)
    cut = [draw for draw in draws if draw.top_p < 1]
    if cut:
        limit_R1 = (top_p_R1 * ONE).ceil().long()
        if all(draw.top_k for draw in cut):
            floor_R1 = _top_p_floor(probs_RV.gather(1, best_ids_RK), limit_R1)
        elif probs_RV.shape[-1] <= HALF_MASK:
            floor_R1 = _top_p_floor(probs_RV, limit_R1)  # less than a histogram has
        else:
            floor_R1 = _top_p_floor_of_all(probs_RV, limit_R1)
        probs_RV.masked_fill_(probs_RV < floor_R1.masked_fill(top_p_R1 >= 1, 0.0), 0.0)
    return _draw(probs_RV, uniform_R1)


def _top_k_floor(best_RK: torch.Tensor, top_k_R1: torch.Tensor) -> torch.Tensor:
    """The smallest logit [R, 1] that each row keeps; -inf where its top_k is 0."""
    kth_R1 = best_RK.gather(1, (top_k_R1 - 1).clamp(0, best_RK.shape[-1] - 1))
    return kth_R1.masked_fill(top_k_R1 == 0, -torch.inf)


def _units(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities as integers, whose sums are exact in any order and on any device."""
    return (probs * ONE).long()


def _top_p_floor(probs_RK: torch.Tensor, limit_R1: torch.Tensor) -> torch.Tensor:
    """The smallest probability [R, 1] that each row keeps, of the K that survived its top_k.

    A token is kept if the probabilities above it sum to less than the limit.
    """
    ranked_RK = probs_RK.sort(-1, descending=True).values
    units_RK = _units(ranked_RK)
    above_RK = units_RK.cumsum(-1) - units_RK
    kept_R1 = (above_RK < limit_R1).sum(-1, keepdim=True).clamp(min=1)
    return ranked_RK.gather(1, kept_R1 - 1)


def _top_p_floor_of_all(probs_RV: torch.Tensor, limit_R1: torch.Tensor) -> torch.Tensor:
    """As `_top_p_floor`, over all tokens and without a sort.

    The bits of a float of at most 1 are an integer below 2^30 that orders as the float does. Its
    upper 15 bits are found first, then its lower 15, each by a histogram of the probabilities.
    """
    bits_RV = probs_RV.view(torch.int32)
    units_RV = _units(probs_RV)
    upper_RV = (bits_RV >> HALF).bitwise_and_(HALF_MASK).long()
    upper_R1, limit_R1 = _digit(upper_RV, units_RV, limit_R1)
    units_RV.masked_fill_(upper_RV != upper_R1, 0)
    lower_R1, _ = _digit((bits_RV & HALF_MASK).long(), units_RV, limit_R1)
    return (upper_R1 << HALF | lower_R1).int().view(torch.float32)


def _digit(
    digits_RV: torch.Tensor, units_RV: torch.Tensor, limit_R1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest digit [R, 1] above which there are fewer units than the limit.

    Also returns how many units of this digit and below the limit still allows.
    """
    histogram_RH = units_RV.new_zeros((len(units_RV), HALF_MASK + 1))
    cumulative_RH = histogram_RH.scatter_add_(1, digits_RV, units_RV).cumsum_(-1)
    beyond_R1 = cumulative_RH[:, -1:] - limit_R1
    digit_R1 = torch.searchsorted(cumulative_RH, beyond_R1, right=True).clamp(max=HALF_MASK)
    return digit_R1, cumulative_RH.gather(1, digit_R1) - beyond_R1


def _draw(probs_RV: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the cumulative sum exceeds its share of the total.

    The sum of each block of tokens is taken first, then the cumulative sum within one block.
    """
    rows, vocab = probs_RV.shape
    blocks = -(-vocab // BLOCK)
    units_RV = probs_RV.new_zeros((rows, blocks * BLOCK), dtype=torch.int64)
    units_RV[:, :vocab] = probs_RV * ONE
    units_RBW = units_RV.view(rows, blocks, BLOCK)
    cumulative_RB = units_RBW.sum(-1).cumsum(-1)
    # Rounded down, which changes no comparison with an integer.
    target_R1 = (uniform_R1 * cumulative_RB[:, -1:]).long()
    block_R1 = torch.searchsorted(cumulative_RB, target_R1, right=True).clamp(max=blocks - 1)
    units_RW = units_RBW.take_along_dim(block_R1.unsqueeze(-1), 1).squeeze(1)
    target_R1 = target_R1 - cumulative_RB.gather(1, block_R1) + units_RW.sum(-1, keepdim=True)
    place_R1 = torch.searchsorted(units_RW.cumsum(-1), target_R1, right=True)
    # In bounds also for a row of nan, whose token nobody uses.
    return (block_R1 * BLOCK + place_R1).clamp(max=vocab - 1).squeeze(-1)
