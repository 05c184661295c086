"""How tokens see one another. Knows no requests and no model.

A plan is made once for a forward and asked by every layer. `PackedPlan`: several prompts in one row, each seeing
itself alone. `SlotPlan`: one new token for each slot of the cache.

Shapes: T tokens of a packed row, S live slots, L places, H query heads, G key/value groups, D head size; Q queries and
K keys of one span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from glmbatch.glm.model.kv_cache import KvPrefix, SlotCache

Store = Callable[[int, torch.Tensor, torch.Tensor], None]


class Plan(Protocol):
    """Who sees whom in one forward: query [T, H, D], key and value [T, G, D], the answer [T, H, D]."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor: ...


class Piece(Protocol):
    """Some queries of a packed row and the keys they see; writes their part of the answer [T, H, D]."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None: ...


class PackedPlan:
    """Several prompts in one row, without padding and without a mask over the row: each piece sees what it may alone.

    The prefix is put before the row's keys, so the pieces count keys from its start. `store` is handed the row's own
    keys and values of every layer.
    """

    def __init__(
        self, pieces: Sequence[Piece], prefix: KvPrefix | None, store: Store | None
    ) -> None:
        self._pieces, self._prefix, self._store = pieces, prefix, store

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        if self._store is not None:
            self._store(layer, key, value)
        if self._prefix is not None:
            key = torch.cat((self._prefix.kv_N2FGD[layer, 0], key))
            value = torch.cat((self._prefix.kv_N2FGD[layer, 1], value))
        out_THD = torch.empty_like(query)
        for piece in self._pieces:
            piece.attend(query, key, value, scaling, out_THD)
        return out_THD


@dataclass(frozen=True, slots=True)
class Span:
    """A run of queries and the stretches of keys that they see.

    `causal`: queries and keys are the same tokens. `mask_QK` is added to the scores. Neither: every query sees all.
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
        attended_1HQD = scaled_dot_product_attention(
            query[self.queries].transpose(0, 1)[None],
            _stretches(key, self.keys),
            _stretches(value, self.keys),
            attn_mask=self.mask_QK,
            is_causal=self.causal,
            scale=scaling,
            enable_gqa=True,
        )
        out[self.queries] = attended_1HQD[0].transpose(0, 1)


def _stretches(row_TGD: torch.Tensor, places: tuple[slice, ...]) -> torch.Tensor:
    """[1, G, K, D] of the tokens at `places`."""
    found = [row_TGD[place] for place in places]
    return (found[0] if len(found) == 1 else torch.cat(found)).transpose(0, 1)[None]


class SlotPlan:
    """One new token for each of the first S slots; its keys and values are written before it attends.

    One call for all slots, of one shape whatever their lengths: `seen` are the places that any of them may look at.
    Query heads of a group become that group's queries, so keys and values are never repeated.
    """

    def __init__(self, cache: SlotCache, places_S: torch.Tensor, seen: int) -> None:
        self._cache, self._places_S, self._seen = cache, places_S, seen
        self._slots_S = torch.arange(len(places_S), device=places_S.device)
        beyond_S11L = torch.arange(seen, device=places_S.device) > places_S[:, None, None, None]
        # Scores, not booleans: attention would turn those into scores again in every layer.
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
        slots, heads, head_dim = query.shape
        self._cache.write(layer, self._slots_S, self._places_S, key, value)
        out = scaled_dot_product_attention(
            query.view(slots, key.shape[1], -1, head_dim),
            self._cache.keys_SGLD[layer][:slots, :, : self._seen],
            self._cache.values_SGLD[layer][:slots, :, : self._seen],
            attn_mask=self._mask_S11L,
            scale=scaling,
        )
        return out.reshape(slots, heads, head_dim)


class SlotLoop:
    """As `SlotPlan`, slot by slot over its own places alone: on CPU, where a call costs less than padding does."""

    def __init__(self, cache: SlotCache, places: Sequence[int]) -> None:
        self._cache = cache
        self._slots_S, self._places_S = torch.arange(len(places)), torch.tensor(places)
        self._seen = [place + 1 for place in places]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        self._cache.write(layer, self._slots_S, self._places_S, key, value)
        slots, heads, head_dim = query.shape
        # One split for all slots: a view of one costs as much as some of its attention.
        each = zip(
            torch.split(query.view(slots, key.shape[1], -1, head_dim), 1),
            torch.split(self._cache.keys_SGLD[layer], 1),
            torch.split(self._cache.values_SGLD[layer], 1),
            self._seen,
            strict=False,
        )
        out = [
            scaled_dot_product_attention(
                query_1GHD,
                keys_1GLD.narrow(2, 0, seen),
                values_1GLD.narrow(2, 0, seen),
                scale=scaling,
            )
            for query_1GHD, keys_1GLD, values_1GLD, seen in each
        ]
        return torch.cat(out).view(slots, heads, head_dim)
