"""Attention of packed batches and of decode steps. Knows no requests and no model.

A plan is made once per forward and used by every layer. `PackedPlan`: several prompts in one batch,
each attending only to itself. `SlotPlan` and `SlotLoop`: one new token per slot of the KV cache.

Shapes: T tokens of a packed batch, S live slots, L places of a slot, H query heads, G key/value
groups, D head size, N layers, F places of a prefix; Q queries and K keys of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from glmbatch.glm.model.kv_cache import KvPrefix, SlotCache

# Called with the number of a layer and its new keys and values [T, G, D].
Store = Callable[[int, torch.Tensor, torch.Tensor], None]


class AttentionPlan(Protocol):
    """Which tokens attend to which in one forward."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [T, H, D] of one layer; query [T, H, D], key and value [T, G, D]."""


class AttentionCall(Protocol):
    """Some queries of a packed batch, and the keys that they attend to."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """Write the attention output of these queries into their rows of `out` [T, H, D].

        query [T, H, D]; key and value of the prefix and the batch, [F + T, G, D].
        """


class PackedPlan:
    """Attention of several prompts in one batch, without padding or a mask over the whole batch.

    The keys of `prefix` precede those of the batch, so `calls` index keys from the prefix's start.
    `store` receives the batch's own keys and values of every layer.
    """

    def __init__(
        self, calls: Sequence[AttentionCall], prefix: KvPrefix | None, store: Store | None
    ) -> None:
        self._calls = calls
        self._prefix = prefix
        self._store = store

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [T, H, D] of one layer; see `AttentionPlan`."""
        if self._store is not None:
            self._store(layer, key, value)
        if self._prefix is not None:
            key = torch.cat((self._prefix.kv_N2FGD[layer, 0], key))
            value = torch.cat((self._prefix.kv_N2FGD[layer, 1], value))
        # Not zeros, because the calls together write every row.
        out_THD = torch.empty_like(query)
        for call in self._calls:
            call.attend(query, key, value, scaling, out_THD)
        return out_THD


@dataclass(frozen=True, slots=True)
class SpanCall:
    """Consecutive queries and the ranges of keys that they attend to.

    `causal`: queries and keys are the same tokens. `mask_QK` is added to the scores. With neither,
    every query attends to all keys.
    """

    queries: slice
    keys: tuple[slice, ...]
    causal: bool = False
    mask_QK: torch.Tensor | None = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """Write the attention output of these queries into `out`; see `AttentionCall`."""
        attended_1HQD = scaled_dot_product_attention(
            query[self.queries].transpose(0, 1)[None],
            _select(key, self.keys),
            _select(value, self.keys),
            attn_mask=self.mask_QK,
            is_causal=self.causal,
            scale=scaling,
            enable_gqa=True,  # grouped queries, without copies of the keys
        )
        out[self.queries] = attended_1HQD[0].transpose(0, 1)


def _select(tokens_TGD: torch.Tensor, ranges: tuple[slice, ...]) -> torch.Tensor:
    """The tokens in `ranges`, [1, G, K, D]; a view if there is one range."""
    parts = [tokens_TGD[part] for part in ranges]
    selected_KGD = parts[0] if len(parts) == 1 else torch.cat(parts)
    return selected_KGD.transpose(0, 1)[None]


class SlotPlan:
    """Attention of one new token in each of the first S slots, in one call of a fixed shape.

    CUDA graphs need shapes that do not depend on lengths: every slot attends over `places` places,
    and those after its own are masked. `places_S` has the place of each new token, whose key and
    value are stored first. The query heads of a group become that group's queries, so that keys and
    values are not repeated.
    """

    def __init__(self, cache: SlotCache, places_S: torch.Tensor, places: int) -> None:
        self._cache = cache
        self._places_S = places_S
        self._places = places
        # Computed once per forward, since every layer needs the same index and mask.
        self._slots_S = torch.arange(len(places_S), device=places_S.device)
        places_L = torch.arange(places, device=places_S.device)
        beyond_S11L = places_L > places_S[:, None, None, None]
        # Not a boolean mask, which attention would convert to this one in every layer.
        mask_S11L = torch.zeros_like(beyond_S11L, dtype=cache.dtype)
        self._mask_S11L = mask_S11L.masked_fill_(beyond_S11L, -torch.inf)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [S, H, D] of one layer; see `AttentionPlan`."""
        slots, heads, head_dim = query.shape
        self._cache.write(layer, self._slots_S, self._places_S, key, value)
        out = scaled_dot_product_attention(
            query.view(slots, key.shape[1], -1, head_dim),
            self._cache.keys_SGLD[layer][:slots, :, : self._places],
            self._cache.values_SGLD[layer][:slots, :, : self._places],
            attn_mask=self._mask_S11L,
            scale=scaling,
        )
        return out.reshape(slots, heads, head_dim)


class SlotLoop:
    """Like `SlotPlan`, but with a call per slot: on CPU, calls cost less than padding."""

    def __init__(self, cache: SlotCache, places: Sequence[int]) -> None:
        self._cache = cache
        self._slots_S = torch.arange(len(places))
        self._places_S = torch.tensor(places)
        self._lengths = [place + 1 for place in places]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [S, H, D] of one layer; see `AttentionPlan`."""
        self._cache.write(layer, self._slots_S, self._places_S, key, value)
        slots, heads, head_dim = query.shape
        # Split once for all slots, because indexing one by one costs a good part of its attention.
        inputs = zip(
            torch.split(query.view(slots, key.shape[1], -1, head_dim), 1),
            torch.split(self._cache.keys_SGLD[layer], 1),
            torch.split(self._cache.values_SGLD[layer], 1),
            self._lengths,
            strict=False,  # the cache may have more slots than are live
        )
        out = [
            scaled_dot_product_attention(
                query_1GHD,
                keys_1GLD.narrow(2, 0, length),
                values_1GLD.narrow(2, 0, length),
                scale=scaling,
            )
            for query_1GHD, keys_1GLD, values_1GLD, length in inputs
        ]
        return torch.cat(out).view(slots, heads, head_dim)
