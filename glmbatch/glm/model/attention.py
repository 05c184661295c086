"""Attention of one forward, each row over its own places, with torch's public call.

`SpanPlan` calls it once per span of queries, and `KernelPlan` has compiled code for the rows of one
query. On CUDA in half precision, `flash.FlashPlan` serves all rows in one or two calls. A plan is
made once per forward and used by every layer. Knows no requests and no model.

Shapes: T tokens, K read tokens of a forward; Q queries and K keys of a span, H query heads, G
key/value groups, D head size, P places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from glmbatch.glm.model.arena import KeyStore

# Queries behind other keys are masked in blocks of this size, so that the mask stays below 70 MB
# at 32k places.
QUERY_BLOCK = 512


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
        """The attention output [T, H, D] of one layer; query [T, H, D], key and value [T, G, D].

        In the last layer there may be fewer queries than keys.
        """


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What one forward needs besides its ids.

    `reads_K` has the indexes of the tokens whose final states are read; None reads all. `last` is
    the attention of the last layer, where only those tokens have queries.
    """

    positions_T: torch.Tensor
    reads_K: torch.Tensor | None
    attention: AttentionPlan
    last: AttentionPlan


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive queries and the consecutive places that they attend to.

    `causal`: queries and keys are the same tokens. `mask_QK` is added to the scores. With neither,
    every query attends to all keys.
    """

    queries: slice
    keys: slice
    causal: bool = False
    mask_QK: torch.Tensor | None = None


class SpanPlan:
    """Attention of all `spans`, one call each: on CPU, calls cost less than padding."""

    def __init__(self, store: KeyStore, spans: Sequence[Span]) -> None:
        self._store = store
        self._spans = spans

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [T, H, D] of one layer; see `AttentionPlan`."""
        stored = self._store.put(layer, key, value)
        # Not zeros, because the spans together write every row.
        out_THD = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        attend_spans(self._spans, query, stored, scaling, out_THD)
        return out_THD


def attend_spans(
    spans: Sequence[Span],
    query_THD: torch.Tensor,
    stored: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
    out_THD: torch.Tensor,
) -> None:
    """Write the attention output of each span's queries into their rows of `out_THD`.

    `stored` has the keys and values [G, P, D] of the layer.
    """
    keys_GPD, values_GPD = stored
    # The arena may keep a wider dtype than the model's.
    query_HTD = query_THD.transpose(0, 1).to(keys_GPD.dtype)
    for span in spans:
        attended_1HQD = scaled_dot_product_attention(
            query_HTD[None, :, span.queries],
            keys_GPD[None, :, span.keys],
            values_GPD[None, :, span.keys],
            attn_mask=span.mask_QK,
            is_causal=span.causal,
            scale=scaling,
            enable_gqa=True,  # grouped queries, without copies of the keys
        )
        out_THD[span.queries] = attended_1HQD[0].transpose(0, 1)


class CausalSpans:
    """Makes the spans of rows whose new tokens end their keys.

    torch's causal mode does not support keys before those of the queries, so a mask hides the last
    keys. One mask serves all rows: each takes the window of it that fits its keys.
    """

    def __init__(self, most_keys: int, dtype: torch.dtype, device: torch.device) -> None:
        self._most_keys = most_keys
        self._dtype = dtype
        self._device = device
        self._mask_QK: torch.Tensor | None = None

    def spans(self, first_query: int, count: int, start: int, used: int) -> Iterator[Span]:
        """Spans of `count` tokens, queries from `first_query` on, that end `used` places.

        `start` is the first of these places.
        """
        before = used - count
        if count == 1 or not before:
            queries = slice(first_query, first_query + count)
            yield Span(queries, slice(start, start + used), causal=count > 1)
            return
        for first in range(0, count, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, count)
            ahead = self._most_keys - before - first
            mask_QK = self._mask()[: last - first, ahead : self._most_keys + last - first]
            queries = slice(first_query + first, first_query + last)
            yield Span(queries, slice(start, start + before + last), mask_QK=mask_QK)

    def _mask(self) -> torch.Tensor:
        if self._mask_QK is None:
            corner_QK = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=self._dtype)
            visible_QK = torch.zeros(QUERY_BLOCK, self._most_keys, dtype=self._dtype)
            self._mask_QK = torch.cat((visible_QK, corner_QK.triu(1)), dim=1).to(self._device)
        return self._mask_QK
