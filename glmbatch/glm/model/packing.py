"""Packs several prompts, and the label trees that continue them, into one batch without padding.

Token order: each prompt, then the nodes of its tree. Read order: for each prompt, its last token,
then its nodes.

Shapes: T tokens of the batch, R prompts, F places of a prefix, N nodes of the tree, K read tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from glmbatch.glm.model import flash
from glmbatch.glm.model.arena import Arena, ArenaKeys, BatchKeys, KeyStore, KvPrefix
from glmbatch.glm.model.attention import CausalSpans, ForwardPlan, Span, SpanPlan
from glmbatch.glm.model.flash import FlashCall, FlashPlan, TreeAttention
from glmbatch.glm.model.label_tree import LabelTree
from glmbatch.glm.model.rows import IntArray, to_device


@dataclass(frozen=True, slots=True)
class PackedPrompt:
    """One prompt of a packed batch: its ids after the shared prefix, and the tree of its labels.

    Its length counts the ids and the nodes of the tree.
    """

    ids: Sequence[int]
    tree: LabelTree | None = None

    def __len__(self) -> int:
        return len(self.ids) + len(self.tree or ())


def pack(
    prompts: Sequence[PackedPrompt],
    prefix: KvPrefix | None,
    scratch: Callable[[int], Arena],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ForwardPlan]:
    """The ids of one packed batch of all `prompts`, each after `prefix`, and its forward.

    `scratch` returns an arena of one layer with at least the given number of places. `dtype` is
    the model's.
    """
    trees = [prompt.tree for prompt in prompts]
    ids = np.fromiter(chain.from_iterable(map(_tokens, prompts)), np.int64)
    before = 0 if prefix is None else prefix.places
    layout = _Layout(np.array([len(prompt.ids) for prompt in prompts]), trees, before)
    positions = layout.positions() + (0 if prefix is None else prefix.next_position)
    ids_T, positions_T, reads_K, places_T, prefix_RF = to_device(
        device, ids, positions, layout.reads_K, layout.places_T, layout.prefix_RF
    )
    store: KeyStore = BatchKeys()
    if prefix is not None:
        store = ArenaKeys(scratch(layout.places), places_T, prefix, prefix_RF)
        dtype = prefix.kv_N2GFD.dtype
    plans = _flash_plans if flash.serves(device, dtype) else _span_plans
    plan, last_plan = plans(layout, store, device, dtype)
    return ids_T, ForwardPlan(positions_T, reads_K, plan, last_plan)


def _tokens(prompt: PackedPrompt) -> Iterator[int]:
    return chain(prompt.ids, prompt.tree.tokens if prompt.tree else ())


class _Layout:
    """Where the tokens of each prompt are: in the batch, and in the places of its row.

    A row has the places of the prefix, `before` of them, of its prompt, and of its nodes.
    """

    def __init__(self, lengths_R: IntArray, trees: Sequence[LabelTree | None], before: int) -> None:
        self.trees = trees
        self.lengths_R = lengths_R
        self.counts_R = np.array([len(tree or ()) for tree in trees])  # nodes
        self.tokens_R = lengths_R + self.counts_R
        self.rows = len(lengths_R)
        self.first_R = self.tokens_R.cumsum() - self.tokens_R
        self.starts_R = self.first_R + before * np.arange(self.rows)
        self.used_R = before + lengths_R  # places that a node attends to, besides its ancestors
        self.ends_R = self.first_R + lengths_R
        # The last token of each prompt, then its nodes.
        self.reads_K = _ranges(self.ends_R - 1, self.counts_R + 1)
        self.reads_R1 = np.append(0, (self.counts_R + 1).cumsum())  # the first of each row
        self._tokens = int(self.tokens_R.sum())
        self.places = self._tokens + before * self.rows
        shift_T = np.repeat(before * np.arange(1, self.rows + 1), self.tokens_R)
        self.places_T = np.arange(self._tokens) + shift_T
        self.prefix_RF = self.starts_R[:, None] + np.arange(before)

    def positions(self) -> IntArray:
        """The position of each token after the prefix, [T]."""
        # Every prompt starts at the same position, since it does not attend to the others.
        positions_T: IntArray = np.arange(self._tokens) - np.repeat(self.first_R, self.tokens_R)
        # Siblings share a position: each is a possible next token of the same text.
        depths = {id(tree): np.array(tree.depths, np.int64) for tree in self.trees if tree}
        if depths:
            depths_K = np.concatenate([depths[id(tree)] for tree in self.trees if tree])
            before_K = np.repeat(self.lengths_R - 1, self.counts_R)
            positions_T[_ranges(self.ends_R, self.counts_R)] = before_K + depths_K
        return positions_T


def _ranges(starts_R: IntArray, counts_R: IntArray) -> IntArray:
    """The numbers from each of `starts_R` on, as many as `counts_R` says, one row after another."""
    before_R = counts_R.cumsum() - counts_R
    ranges: IntArray = np.arange(counts_R.sum()) + np.repeat(starts_R - before_R, counts_R)
    return ranges


def _span_plans(
    layout: _Layout, store: KeyStore, device: torch.device, dtype: torch.dtype
) -> tuple[SpanPlan, SpanPlan]:
    """One span for each prompt and one for its nodes."""
    most = int(layout.used_R.max())
    causal = CausalSpans(most, dtype, device)
    masks: dict[int, torch.Tensor] = {}  # by the tree's identity, as most batches have one tree
    spans: list[Span] = []
    last_spans: list[Span] = []
    numbers = (layout.first_R, layout.lengths_R, layout.starts_R, layout.used_R, layout.reads_R1)
    rows = np.stack([numbers_R[: layout.rows] for numbers_R in numbers], axis=1).tolist()
    for tree, (first, length, start, used, read) in zip(layout.trees, rows, strict=True):
        spans += causal.spans(first, length, start, used)
        last_spans += causal.spans(read, 1, start, used)
        if tree:
            if id(tree) not in masks:
                masks[id(tree)] = _node_mask(tree, most, dtype, device)
            nodes, at = len(tree), first + length
            keys, mask = slice(start, start + used + nodes), masks[id(tree)][:, most - used :]
            spans.append(Span(slice(at, at + nodes), keys, mask_QK=mask))
            last_spans.append(Span(slice(read + 1, read + 1 + nodes), keys, mask_QK=mask))
    return SpanPlan(store, spans), SpanPlan(store, last_spans)


def _node_mask(
    tree: LabelTree, most: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Added to the scores of a tree's nodes over `most` places of a prompt and the tree, [N, K]."""
    (closes_1N,) = to_device(device, np.array([tree.closes]))
    visible_NF = torch.zeros(len(tree), most, dtype=dtype, device=device)
    return torch.cat((visible_NF, tree_mask(closes_1N)[0].to(dtype)), dim=1)


def _flash_plans(
    layout: _Layout, store: KeyStore, device: torch.device, dtype: torch.dtype
) -> tuple[FlashPlan, FlashPlan]:
    """One call for all prompts and one for all nodes."""
    rows, nodes = layout.rows, int(layout.counts_R.max())
    most = int((layout.used_R + layout.counts_R).max())
    ends, starts, used, every, each, reads = to_device(
        device,
        np.append(layout.first_R, layout.tokens_R.sum()),
        np.append(layout.starts_R, 0),
        layout.used_R,
        layout.used_R + layout.counts_R,
        np.arange(rows + 1) * nodes,
        layout.reads_R1,
    )
    ends, starts, used, every, each, reads = (
        numbers.int() for numbers in (ends, starts, used, every, each, reads)
    )
    # Nodes are queries of this call too, since they lie between prompts; their output is replaced.
    prompts = FlashCall(ends, starts, every, int(layout.tokens_R.max()), most, causal=True)
    read = FlashCall(reads, starts, used, nodes + 1, most)
    trees = last_trees = None
    if nodes:
        # At least two, because with one the operator orders the sums of weights otherwise.
        to_prompts = FlashCall(each, starts, used, max(2, nodes), most)
        trees, last_trees = _tree_attention(layout, nodes, to_prompts, device)
    everything = slice(None)
    return (
        FlashPlan(store, [(everything, prompts)], trees),
        FlashPlan(store, [(everything, read)], last_trees),
    )


def _tree_attention(
    layout: _Layout, nodes: int, to_prompts: FlashCall, device: torch.device
) -> tuple[TreeAttention, TreeAttention]:
    """Attention of the nodes to their trees, in a forward and in its last layer.

    A smaller tree is padded with nodes that no node attends to, and whose output is not used.
    """
    has_node_RN = np.arange(nodes) < layout.counts_R[:, None]
    # Padding takes the last token of its own row.
    within_RN = np.minimum(np.arange(nodes), layout.counts_R[:, None] - 1)
    nodes_RN = layout.ends_R[:, None] + within_RN
    queries_RN = layout.reads_R1[:-1, None] + 1 + within_RN
    trees = layout.trees
    if all(tree is trees[0] for tree in trees):
        trees = trees[:1]  # one mask for all rows
    closes_RN = np.zeros((len(trees), nodes), np.int64)
    for closes_N, tree in zip(closes_RN, trees, strict=True):
        closes_N[: len(tree or ())] = tree.closes if tree else ()
    keys_RN, reads_RN, kept, closes = to_device(
        device, nodes_RN, queries_RN, np.flatnonzero(has_node_RN), closes_RN
    )
    kept_K = None if has_node_RN.all() else kept
    mask_RNN = tree_mask(closes)
    return (
        TreeAttention(keys_RN, keys_RN, kept_K, to_prompts, mask_RNN),
        TreeAttention(keys_RN, reads_RN, kept_K, to_prompts, mask_RNN),
    )


def tree_mask(closes_RN: torch.Tensor) -> torch.Tensor:
    """0 where a node attends to a node, -inf elsewhere, [R, N, N] in float32.

    Made for each forward, from a number for each node: nothing of it stays on the device.
    """
    node_N = torch.arange(closes_RN.shape[1], device=closes_RN.device)
    # Siblings must not attend to each other, only to their ancestors and themselves.
    below_RNN = (node_N[:, None] >= node_N) & (node_N[:, None] < closes_RN[:, None, :])
    mask_RNN = torch.full(below_RNN.shape, -torch.inf, device=closes_RN.device)
    return mask_RNN.masked_fill_(below_RNN, 0)
