"""Attention of the rows with one new token, compiled by numba: an arena in float32 on CPU.

With torch, each row is a small product, which reads keys and values at a fifth of the speed of
memory. The kernel stores the new keys and values of all tokens, and attends for the rows of one
token, in one call. Head size and heads per group are constants of the compiled code, so that its
inner loops vectorize fully.

Compiling takes a few seconds at the first decode step; numba caches the code on disk for later
processes if it can. It uses one thread, since the work of a layer is too small for two. Knows no
requests and no model.

Shapes: T tokens, R rows of one token, P places of the arena, L places of a row, H query heads, G
key/value groups, D head size; h heads of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch

from glmbatch.glm.model.arena import ArenaKeys
from glmbatch.glm.model.attention import Span, attend_spans

# Sums may be reordered, but nan and inf must propagate, so that a row with them is noticed.
_OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
    "error_model": "numpy",
}
# New queries, keys and values are views of one tensor and may have any strides. With a single
# signature, the code is compiled only once.
_SIGNATURE = (
    "void(UniTuple(float32[:,:,:], 3), UniTuple(float32[:,:,::1], 2), "
    "UniTuple(int64[::1], 3), float32, float32[:,:,::1])"
)
# Inlined into the caller, where head size and heads per group are constants.
_inlined: Callable[[Callable[..., Any]], Any] = numba.njit(forceinline=True, **_OPTIONS)


@_inlined
def _exp(x: Any) -> Any:
    """e**x for x <= 0 within two units in the last place; 0 for x < -87.

    Uses arithmetic alone, so that loops over it vectorize. e**x is 2**r * e**f with an integer r
    and |f| <= log(2) / 2. The polynomial and the split of log(2) are those of Cephes' expf.
    """
    least = np.float32(-87)
    vanishes = x < least  # False for nan, which stays nan
    x = least if vanishes else x
    r = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    f = x - r * np.float32(0.693359375) + r * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * f + np.float32(1.3981999507e-3)
    y = y * f + np.float32(8.3334519073e-3)
    y = y * f + np.float32(4.1665795894e-2)
    y = y * f + np.float32(1.6666665459e-1)
    y = y * f + np.float32(5.0000001201e-1)
    y = y * f * f + f + np.float32(1)
    y = y * np.int32((np.int32(r) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if vanishes else y


@_inlined
def _score(query_hD: Any, keys_LD: Any, places: Any, scores_hL: Any) -> None:
    for place in range(places):
        for head in range(query_hD.shape[0]):
            score = np.float32(0)
            for d in range(query_hD.shape[1]):
                score += query_hD[head, d] * keys_LD[place, d]
            scores_hL[head, place] = score


@_inlined
def _weigh(scores_L: Any, places: Any) -> Any:
    """Turn scores into unnormalized softmax weights in place; returns their sum."""
    top = scores_L[0]
    total = np.float32(0)
    for place in range(places):
        top = scores_L[place] if scores_L[place] > top else top
    for place in range(places):
        scores_L[place] = _exp(scores_L[place] - top)
        total += scores_L[place]
    return total


@_inlined
def _mix(weights_hL: Any, values_LD: Any, places: Any, out_hD: Any) -> None:
    """Write the weighted sums of the values into `out_hD`.

    Takes four places at a time, so that a sum is loaded and stored a quarter as often.
    """
    out_hD[:] = 0
    fours = places // 4 * 4
    for place in range(0, fours, 4):
        for head in range(out_hD.shape[0]):
            w0, w1 = weights_hL[head, place], weights_hL[head, place + 1]
            w2, w3 = weights_hL[head, place + 2], weights_hL[head, place + 3]
            for d in range(out_hD.shape[1]):
                first_two = w0 * values_LD[place, d] + w1 * values_LD[place + 1, d]
                out_hD[head, d] += (
                    first_two + w2 * values_LD[place + 2, d] + w3 * values_LD[place + 3, d]
                )
    for place in range(fours, places):
        for head in range(out_hD.shape[0]):
            for d in range(out_hD.shape[1]):
                out_hD[head, d] += weights_hL[head, place] * values_LD[place, d]


@functools.cache
def _kernel(of_group: int, head_dim: int) -> Callable[..., None]:
    """The compiled kernel for `of_group` query heads per key/value group."""

    def attend(new: Any, arena: Any, rows: Any, scaling: Any, out_RHD: Any) -> None:
        (q_THD, k_TGD, v_TGD), (keys_GPD, values_GPD) = new, arena
        places_T, starts_R, used_R = rows
        query_hD = np.empty((of_group, head_dim), np.float32)
        mixed_hD = np.empty((of_group, head_dim), np.float32)
        total_h = np.empty(of_group, np.float32)
        weights_hL = np.empty((of_group, used_R.max()), np.float32)
        for token in range(len(places_T)):
            for group in range(keys_GPD.shape[0]):
                keys_GPD[group, places_T[token]] = k_TGD[token, group]
                values_GPD[group, places_T[token]] = v_TGD[token, group]
        for row in range(len(starts_R)):
            start, used = starts_R[row], used_R[row]
            for group in range(keys_GPD.shape[0]):
                keys_LD = keys_GPD[group, start : start + used]
                values_LD = values_GPD[group, start : start + used]
                first = group * of_group
                for head in range(of_group):
                    for d in range(head_dim):
                        query_hD[head, d] = q_THD[row, first + head, d] * scaling
                _score(query_hD, keys_LD, used, weights_hL)
                for head in range(of_group):
                    total_h[head] = _weigh(weights_hL[head], used)
                _mix(weights_hL, values_LD, used, mixed_hD)
                for head in range(of_group):
                    out_RHD[row, first + head] = mixed_hD[head] / total_h[head]

    try:
        return _compile(attend, cache=True)
    except (RuntimeError, OSError):  # no writable cache folder, or no space in it
        return _compile(attend, cache=False)


def _compile(attend: Callable[..., None], cache: bool) -> Callable[..., None]:
    compiled: Callable[..., None] = numba.njit(_SIGNATURE, nogil=True, cache=cache, **_OPTIONS)(
        attend
    )
    return compiled


class KernelPlan:
    """Like `SpanPlan`, but one compiled call for the first rows, which have one query each.

    `starts_R` and `used_R` have the first place and the number of places of these rows. `spans` are
    those of the other rows, after them.
    """

    def __init__(
        self,
        store: ArenaKeys,
        starts_R: np.ndarray[Any, Any],
        used_R: np.ndarray[Any, Any],
        spans: Sequence[Span],
    ) -> None:
        self._arena = store.arena
        self._places_T = store.places_T.numpy()
        self._starts_R = starts_R
        self._used_R = used_R
        self._spans = spans
        # Checked here, because the compiled code does not check bounds.
        assert self._places_T.max() < store.arena.places
        assert (starts_R + used_R).max() <= store.arena.places

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [T, H, D] of one layer; see `AttentionPlan`."""
        out = torch.empty(query.shape, dtype=torch.float32)
        keys_GPD, values_GPD = self._arena.layer(layer)
        # In half precision, the copies are of the new tokens alone.
        query_THD = query.float()
        _kernel(query.shape[1] // key.shape[1], query.shape[2])(
            (query_THD.numpy(), key.float().numpy(), value.float().numpy()),
            (keys_GPD.numpy(), values_GPD.numpy()),
            (self._places_T, self._starts_R, self._used_R),
            np.float32(scaling),
            out[: len(self._starts_R)].numpy(),
        )
        attend_spans(self._spans, query_THD, (keys_GPD, values_GPD), scaling, out)
        return out.to(query.dtype)
