"""Attention of a whole packed row in two calls instead of one for each prompt and tree, where launches cost the most.

For CUDA in half precision, which alone has kernels for it. Knows no requests.

Shapes: T tokens, H query heads, G key/value groups, D head size; R trees of at most N nodes that see at most K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from glmbatch.glm.model.attention import Span
from glmbatch.glm.model.kv_cache import round_up


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for it."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


class PromptCall:
    """All prompts in one variable-length call; `lengths` are each prompt's queries and keys, both ending together.

    `key_index` gathers the keys prompt by prompt where they do not already lie so.
    """

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        key_index: Sequence[int] | None,
        device: torch.device,
    ) -> None:
        queries, keys = zip(*lengths, strict=True)
        self._queries, self._keys = sum(queries), sum(keys)
        self._query_ends, self._key_ends = _ends(queries, device), _ends(keys, device)
        self._longest = max(queries), max(keys)
        self._key_index = None if key_index is None else torch.tensor(key_index, device=device)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        repeats = query.shape[1] // key.shape[1]
        attended_QHD: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # a pair only when asked for one
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
        # torch 2.11 knows no grouped queries here; copying two groups costs about 1 % of the forward.
        return key_TGD.repeat_interleave(repeats, dim=1)


def _ends(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class TreeCall:
    """All label trees in one call, padded to the same shape; their few queries make padding cheap.

    `spans` are masked and follow one another.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        queries = [range(span.queries.start, span.queries.stop) for span in spans]
        keys = [
            [key for stretch in span.keys for key in range(stretch.start, stretch.stop)]
            for span in spans
        ]
        most_queries, most_keys = max(map(len, queries)), round_up(max(map(len, keys)))
        mask_RNK = torch.full((len(spans), most_queries, most_keys), -torch.inf)
        for at, span in enumerate(spans):
            assert span.mask_QK is not None
            # Padding queries see what the first node does: a row of -inf alone would be nan.
            mask_RNK[at, :, : len(keys[at])] = span.mask_QK[0].float()
            mask_RNK[at, : len(queries[at]), : len(keys[at])] = span.mask_QK.float()
        assert spans[0].mask_QK is not None
        self._mask_R11NK = mask_RNK.to(device, spans[0].mask_QK.dtype)[:, None, None]
        self._queries = slice(queries[0].start, queries[-1].stop)
        self._query_index_RN = torch.tensor(
            [_padded(row, most_queries) for row in queries], device=device
        )
        self._key_index_RK = torch.tensor([_padded(row, most_keys) for row in keys], device=device)
        kept = [
            at * most_queries + node for at, row in enumerate(queries) for node in range(len(row))
        ]
        self._kept = torch.tensor(kept, device=device)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        trees, nodes = self._query_index_RN.shape
        heads, groups = query.shape[1], key.shape[1]
        # Query heads of a group become that group's queries: kernels that take a mask know no grouped queries.
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
        out[self._queries] = attended_RNHD.flatten(0, 1)[self._kept]


def _padded(row: Sequence[int], length: int) -> list[int]:
    return [*row, *[row[0]] * (length - len(row))]
