"""How tokens see one another, behind transformers' attention registry. Knows no requests and no model.

A plan is made once for a forward and asked by every layer. `PackedPlan`: several prompts in one row, each seeing
itself alone. `SlotPlan`: one new token for each slot of the cache.

Shapes: T tokens of a packed row, S live slots, L places, H query heads, G key/value groups, D head size; Q queries and
K keys of one span. 1 is the batch of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from glmbatch.glm.kv_cache import KvPrefix, SlotCache, round_up

NAME = "glmbatch"

Store = Callable[[int, torch.Tensor, torch.Tensor], None]


class Plan(Protocol):
    """Who sees whom in one forward. All tensors come as [B, heads, tokens, D]; the answer is [B, tokens, H, D]."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor: ...


def _attend(  # noqa: PLR0913 - the registry's signature
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    plan: Plan,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    return plan.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, _attend)


class Piece(Protocol):
    """Some queries of a packed row and the keys they see; writes their part of the answer [1, T, H, D]."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None: ...


class PackedPlan:
    """Several prompts in one row, without padding and without a mask over the row: each piece sees what it may alone.

    The prefix is put before the row's keys, so the pieces count keys from its start. `store` is handed the row's own
    keys and values of every layer.
    """

    def __init__(self, pieces: Sequence[Piece], prefix: KvPrefix | None, store: Store | None) -> None:
        self._pieces, self._prefix, self._store = pieces, prefix, store

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        if self._store is not None:
            self._store(layer, key, value)
        if self._prefix is not None:
            key = torch.cat((self._prefix.kv_N2GFD[layer, 0][None], key), dim=2)
            value = torch.cat((self._prefix.kv_N2GFD[layer, 1][None], value), dim=2)
        _, heads, tokens, head_dim = query.shape
        out_1THD = query.new_empty(1, tokens, heads, head_dim)
        for piece in self._pieces:
            piece.attend(query, key, value, scaling, out_1THD)
        return out_1THD


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
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None:
        attended_1HQD = scaled_dot_product_attention(
            query[:, :, self.queries],
            _stretches(key, self.keys),
            _stretches(value, self.keys),
            attn_mask=self.mask_QK,
            is_causal=self.causal,
            scale=scaling,
            enable_gqa=True,
        )
        out[:, self.queries] = attended_1HQD.transpose(1, 2)


def _stretches(row_1GTD: torch.Tensor, places: tuple[slice, ...]) -> torch.Tensor:
    found = [row_1GTD[:, :, place] for place in places]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


class SlotPlan:
    """One new token for each of the first S slots; its keys and values are written before it attends.

    Query heads of a group become that group's queries, so keys and values are never repeated.
    """

    def __init__(self, cache: SlotCache, places: Sequence[int]) -> None:
        device, dtype = cache.keys_SGLD[0].device, cache.keys_SGLD[0].dtype
        self._cache = cache
        self._slots_S = torch.arange(len(places), device=device)
        self._places_S = torch.tensor(places, device=device)
        self._seen = round_up(max(places) + 1)
        beyond_S11L = torch.arange(self._seen, device=device) > self._places_S[:, None, None, None]
        # Scores, not booleans: attention would turn those into scores again in every layer.
        self._mask_S11L = torch.zeros_like(beyond_S11L, dtype=dtype).masked_fill_(beyond_S11L, -torch.inf)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        slots, heads, _, head_dim = query.shape
        self._cache.write(layer, self._slots_S, self._places_S, key[:, :, 0], value[:, :, 0])
        out = scaled_dot_product_attention(
            query.reshape(slots, key.shape[1], -1, head_dim),
            self._cache.keys_SGLD[layer][:slots, :, : self._seen],
            self._cache.values_SGLD[layer][:slots, :, : self._seen],
            attn_mask=self._mask_S11L,
            scale=scaling,
        )
        return out.reshape(slots, 1, heads, head_dim)
