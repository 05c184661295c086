"""Attention of a whole forward in one or two calls, by each row's own places: CUDA, half precision.

The call is torch's own flash attention with the number of places that each row uses. With that
number, the offsets of rows need not be adjacent or sorted, so a row may lie anywhere in an arena,
and nothing is padded, masked or repeated. Queries of a group share its keys. The operator is
private to torch; a test holds its signature. Knows no requests.

Shapes: T tokens, Q queries, R rows, H query heads, G key/value groups, h heads of a group, D head
size, P places, N nodes of a label tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import pad

from glmbatch.glm.model.arena import KeyStore

# From so many rows of one query on, the operator splits the places of none: on an H100 from 106.
UNSPLIT_ROWS = 128


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has this call on `device` in `dtype`: on GPUs from Ampere on."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and _capability(device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True, slots=True)
class FlashCall:
    """Consecutive queries of R rows, and the places of each row.

    `ends_R1` has the first query of each row, and the end of the last. `starts_R1` has the first
    place of each row, and one number more that is not read. `causal`: the queries end the row's
    places; otherwise every query attends to all of them. The two maxima are bounds.
    """

    ends_R1: torch.Tensor
    starts_R1: torch.Tensor
    used_R: torch.Tensor
    max_queries: int
    max_used: int
    causal: bool = False

    def __call__(
        self,
        query_QHD: torch.Tensor,
        keys_GPD: torch.Tensor,
        values_GPD: torch.Tensor,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention output [Q, H, D], and the logarithms [H, Q] of the sums of its weights."""
        out_QHD, log_sums_HQ, *_ = torch.ops.aten._flash_attention_forward(
            query_QHD,
            keys_GPD.transpose(0, 1),
            values_GPD.transpose(0, 1),
            self.ends_R1,
            self.starts_R1,
            self.max_queries,
            self.max_used,
            0.0,
            self.causal,
            False,
            scale=scaling,
            window_size_left=-1,
            window_size_right=0 if self.causal else -1,
            seqused_k=self.used_R,
        )
        return out_QHD, log_sums_HQ

    def attend(
        self,
        query_QHD: torch.Tensor,
        keys_GPD: torch.Tensor,
        values_GPD: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [Q, H, D]."""
        return self(query_QHD, keys_GPD, values_GPD, scaling)[0]


class SingleQueries:
    """Many rows of one query each, whose numbers are as in `FlashCall`; nothing is copied.

    For one query, the operator makes queries of the heads of a group by three copies: of the
    queries, of the output, and of the queries back (`seqlenq_ngroups_swapped` in flash_api.cpp).
    Here each group of a row is a row of one head, whose queries already lie one after the other.
    """

    def __init__(self, starts_R1: torch.Tensor, used_R: torch.Tensor, max_used: int) -> None:
        self._starts_R1 = starts_R1
        self._used_R = used_R
        self._max_used = max_used
        self._calls: dict[int, FlashCall] = {}  # by heads of a token in memory

    def attend(
        self,
        query_RHD: torch.Tensor,
        keys_GPD: torch.Tensor,
        values_GPD: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [R, H, D]."""
        rows, heads, size = query_RHD.shape
        # Behind the queries of a token may lie its keys and values, one product's output. They are
        # queries of its last group, and their output is cut off.
        width = query_RHD.stride(0) // size
        assert query_RHD.stride() == (width * size, size, 1)
        if width not in self._calls:
            self._calls[width] = self._by_group(width, heads, *keys_GPD.shape[:2])
        query_Q1D = query_RHD.as_strided((rows * width, 1, size), (size, size, 1))
        keys_1PD, values_1PD = keys_GPD.view(1, -1, size), values_GPD.view(1, -1, size)
        out_Q1D = self._calls[width].attend(query_Q1D, keys_1PD, values_1PD, scaling)
        return out_Q1D.view(rows, width, size)[:, :heads]

    def _by_group(self, width: int, heads: int, groups: int, places: int) -> FlashCall:
        def multiples(count: int, step: int) -> torch.Tensor:
            device = self._used_R.device
            return torch.arange(0, count * step, step, dtype=torch.int32, device=device)

        rows, of_group = len(self._used_R), heads // groups
        first_RG = multiples(rows, width)[:, None] + multiples(groups, of_group)
        starts_RG = self._starts_R1[:-1, None] + multiples(groups, places)
        return FlashCall(
            pad(first_RG.flatten(), (0, 1), value=rows * width),
            pad(starts_RG.flatten(), (0, 1)),
            self._used_R[:, None].expand(-1, groups).flatten(),
            of_group + width - heads,
            self._max_used,
        )


def single_queries(
    each_R1: torch.Tensor, starts_R1: torch.Tensor, used_R: torch.Tensor, max_used: int
) -> FlashCall | SingleQueries:
    """Rows of one query each, over an arena; `each_R1` counts from 0 to the number of rows."""
    if len(used_R) < UNSPLIT_ROWS:
        return FlashCall(each_R1, starts_R1, used_R, 1, max_used)
    return SingleQueries(starts_R1, used_R, max_used)


class FlashPlan:
    """Attention by `calls` over consecutive parts of the queries, then over label trees."""

    def __init__(
        self,
        store: KeyStore,
        calls: Sequence[tuple[slice, FlashCall | SingleQueries]],
        trees: TreeAttention | None = None,
    ) -> None:
        self._store = store
        self._calls = calls
        self._trees = trees

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The attention output [T, H, D] of one layer; see `AttentionPlan`."""
        keys_GPD, values_GPD = self._store.put(layer, key, value)
        parts = [
            call.attend(query[queries], keys_GPD, values_GPD, scaling)
            for queries, call in self._calls
        ]
        out_THD = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._trees is not None:
            self._trees.attend(query, (key, value), (keys_GPD, values_GPD), scaling, out_THD)
        return out_THD


@dataclass(frozen=True, slots=True)
class TreeAttention:
    """Attention of the nodes of label trees, padded to the largest tree of the batch.

    A node attends to its row's prompt and to its lineage. Both parts are computed apart, and
    merged by the sums of their weights, so that a mask covers the tree alone. `nodes_RN` are the
    nodes among the tokens of the batch, and `queries_RN` among the queries. `kept_K` has those of
    them, one row after another, that are no padding; None if none is. `prompts` is the call over
    the prompts.
    `mask_RNN` is added to the scores, one for each row or for all.
    """

    nodes_RN: torch.Tensor
    queries_RN: torch.Tensor
    kept_K: torch.Tensor | None
    prompts: FlashCall
    mask_RNN: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        stored: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """Write the attention output of all nodes into their rows of `out` [T, H, D].

        query [T, H, D]; `new` has the keys and values [T, G, D] of the batch, and `stored` has
        those of the prompts [G, P, D].
        """
        key, value = new
        rows, nodes = self.nodes_RN.shape
        heads, groups = query.shape[1], key.shape[1]
        query_RNHD = query[self.queries_RN]
        to_prompt_QHD, log_sums_HQ = self.prompts(query_RNHD.flatten(0, 1), *stored, scaling)
        # The query heads of a group become its queries, so that keys are not repeated.
        query_RGhND = query_RNHD.view(rows, nodes, groups, -1, query.shape[2]).permute(
            0, 2, 3, 1, 4
        )
        of_group = heads // groups
        query_RGQD = query_RGhND.reshape(rows, groups, of_group * nodes, -1)
        scores_RGQN = query_RGQD @ key[self.nodes_RN].permute(0, 2, 3, 1)
        scores_RHNN = scores_RGQN.float().view(rows, heads, nodes, nodes) * scaling
        scores_RHNN += self.mask_RNN[:, None]
        weights_RGQN = scores_RHNN.softmax(-1).to(value.dtype).view(scores_RGQN.shape)
        to_tree_RGQD = weights_RGQN @ value[self.nodes_RN].transpose(1, 2)
        to_tree_RNHD = to_tree_RGQD.view(rows, heads, nodes, -1).transpose(1, 2)
        log_sums_RNH = scores_RHNN.logsumexp(-1).transpose(1, 2)
        to_prompt_RNHD = to_prompt_QHD.view(rows, nodes, heads, -1)
        share_RNH = torch.sigmoid(log_sums_HQ.T.reshape(rows, nodes, heads) - log_sums_RNH)
        out_RNHD = torch.lerp(to_tree_RNHD, to_prompt_RNHD, share_RNH[..., None].to(out.dtype))
        if self.kept_K is None:
            out[self.queries_RN] = out_RNHD
        else:  # not the padding: it stands at the places of other tokens
            queries_K = self.queries_RN.flatten()[self.kept_K]
            out[queries_K] = out_RNHD.flatten(0, 1)[self.kept_K]
