"""Attention of a whole packed batch in two calls, instead of one per prompt and per tree.

Used on CUDA, where launching kernels is costly, and in half precision, for which alone torch has
variable-length kernels. Knows no requests.

Shapes: T tokens, H query heads, G key/value groups, D head size, Q queries; R trees of at most N
nodes that attend to at most K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from glmbatch.glm.model.attention import SpanCall
from glmbatch.glm.model.kv_cache import round_up


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has kernels for these calls on `device` in `dtype`."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


class PromptCall:
    """Attention of all prompts in one variable-length call.

    `lengths` has the numbers of queries and of keys of each prompt; both end at the same token.
    `key_index` orders the keys prompt by prompt; None if they already are.
    """

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        key_index: Sequence[int] | None,
        device: torch.device,
    ) -> None:
        queries = [length[0] for length in lengths]
        keys = [length[1] for length in lengths]
        self._queries = sum(queries)
        self._keys = sum(keys)
        self._query_ends = _ends(queries, device)
        self._key_ends = _ends(keys, device)
        self._longest = (max(queries), max(keys))
        self._key_index = None if key_index is None else torch.tensor(key_index, device=device)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """Write the attention output of all prompts into `out`; see `AttentionCall`."""
        repeats = query.shape[1] // key.shape[1]
        attended_QHD: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # a pair on request
            query[: self._queries],
            self._gather(key, repeats),
            self._gather(value, repeats),
            self._query_ends,
            self._key_ends,
            *self._longest,
            scale=scaling,
            window_size=(-1, 0),
        )
        out[: self._queries] = attended_QHD

    def _gather(self, key_TGD: torch.Tensor, repeats: int) -> torch.Tensor:
        key_TGD = key_TGD[: self._keys] if self._key_index is None else key_TGD[self._key_index]
        # torch 2.11's call has no grouped queries. Copying two groups costs 1 % of the forward.
        return key_TGD.repeat_interleave(repeats, dim=1)


def _ends(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class TreeCall:
    """Attention of all label trees in one call, padded to one shape.

    Trees have few queries, so padding is cheap. `spans` have masks, and their queries are adjacent.
    """

    def __init__(self, spans: Sequence[SpanCall], device: torch.device) -> None:
        queries = [list(range(span.queries.start, span.queries.stop)) for span in spans]
        keys = [_indexes(span.keys) for span in spans]
        most_queries = max(map(len, queries))
        most_keys = round_up(max(map(len, keys)))
        # Everything is masked until a span's mask is copied in; padding keys stay masked.
        mask_RNK = torch.full((len(spans), most_queries, most_keys), -torch.inf)
        node_rows: list[int] = []
        for number, span in enumerate(spans):
            assert span.mask_QK is not None
            nodes, width = span.mask_QK.shape
            # Padding queries attend like the first node, because a row of only -inf gives nan.
            mask_RNK[number, :, :width] = span.mask_QK[0].float()
            mask_RNK[number, :nodes, :width] = span.mask_QK.float()
            first = number * most_queries
            node_rows += range(first, first + nodes)
        assert spans[0].mask_QK is not None
        self._mask_R11NK = mask_RNK.to(device, spans[0].mask_QK.dtype)[:, None, None]
        self._queries = slice(queries[0][0], queries[-1][-1] + 1)
        self._query_index_RN = _padded(queries, most_queries, device)
        self._key_index_RK = _padded(keys, most_keys, device)
        self._node_rows = torch.tensor(node_rows, device=device)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """Write the attention output of all nodes into their rows of `out`; see `AttentionCall`."""
        trees, nodes = self._query_index_RN.shape
        heads, groups = query.shape[1], key.shape[1]
        # The query heads of a group become its queries, because kernels with a mask have no
        # grouped queries.
        query_RHND = query[self._query_index_RN].transpose(1, 2)
        mask = self._mask_R11NK.expand(-1, 1, heads // groups, -1, -1).flatten(2, 3)
        attended = scaled_dot_product_attention(
            query_RHND.reshape(trees, groups, heads // groups * nodes, -1),
            key[self._key_index_RK].transpose(1, 2),
            value[self._key_index_RK].transpose(1, 2),
            attn_mask=mask,
            scale=scaling,
        )
        attended_RNHD = attended.reshape(trees, heads, nodes, -1).transpose(1, 2)
        out[self._queries] = attended_RNHD.flatten(0, 1)[self._node_rows]


def _indexes(ranges: Sequence[slice]) -> list[int]:
    indexes: list[int] = []
    for part in ranges:
        indexes += range(part.start, part.stop)
    return indexes


def _padded(rows: Sequence[list[int]], length: int, device: torch.device) -> torch.Tensor:
    """`rows` [R, length], each padded with its own first index."""
    filled = [row + row[:1] * (length - len(row)) for row in rows]
    return torch.tensor(filled, device=device)
