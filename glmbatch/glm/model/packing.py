"""Packs several prompts, and the label trees that continue them, into one batch without padding.

Token order: each prompt, then the nodes of its tree. Read order: for each prompt, its last token,
then its nodes.

Shapes: T tokens of the batch, R prompts, F places of a prefix, N nodes of the tree, K read tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
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

    All have the same tree, or none.
    `scratch` returns an arena of one layer with at least the given number of places. `dtype` is
    the model's.
    """
    tree = prompts[0].tree
    tree_ids = tree.tokens if tree else ()
    ids = np.fromiter(chain.from_iterable(chain(p.ids, tree_ids) for p in prompts), np.int64)
    before = 0 if prefix is None else prefix.places
    layout = _Layout(np.array([len(prompt.ids) for prompt in prompts]), len(tree_ids), before)
    positions = layout.positions(tree) + (0 if prefix is None else prefix.next_position)
    ids_T, positions_T, reads_RK, places_T, prefix_RF = to_device(
        device, ids, positions, layout.reads_RK, layout.places_T, layout.prefix_RF
    )
    store: KeyStore = BatchKeys()
    if prefix is not None:
        store = ArenaKeys(scratch(layout.places), places_T, prefix, prefix_RF)
        dtype = prefix.kv_N2GFD.dtype
    plans = _flash_plans if flash.serves(device, dtype) else _span_plans
    plan, last_plan = plans(layout, store, tree, device, dtype)
    return ids_T, ForwardPlan(positions_T, reads_RK.reshape(-1), plan, last_plan)


class _Layout:
    """Where the tokens of each prompt are: in the batch, and in the places of its row.

    A row has the places of the prefix, `before` of them, of its prompt, and of its nodes.
    """

    def __init__(self, lengths_R: IntArray, nodes: int, before: int) -> None:
        self.lengths_R = lengths_R
        self.nodes = nodes
        self.tokens_R = lengths_R + nodes
        self.rows = len(lengths_R)
        self.first_R = self.tokens_R.cumsum() - self.tokens_R
        self.starts_R = self.first_R + before * np.arange(self.rows)
        self.used_R = before + lengths_R  # places that a node attends to, besides its lineage
        ends_R = self.first_R + lengths_R
        self.nodes_RN = ends_R[:, None] + np.arange(nodes)
        self.reads_RK = ends_R[:, None] - 1 + np.arange(nodes + 1)
        self._tokens = int(self.tokens_R.sum())
        self.places = self._tokens + before * self.rows
        shift_T = np.repeat(before * np.arange(1, self.rows + 1), self.tokens_R)
        self.places_T = np.arange(self._tokens) + shift_T
        self.prefix_RF = self.starts_R[:, None] + np.arange(before)

    def positions(self, tree: LabelTree | None) -> IntArray:
        """The position of each token after the prefix, [T]."""
        # Every prompt starts at the same position, since it does not attend to the others.
        positions_T = np.arange(self._tokens) - np.repeat(self.first_R, self.tokens_R)
        if tree:
            # Siblings share a position: each is a possible next token of the same text.
            positions_T[self.nodes_RN] = self.lengths_R[:, None] - 1 + np.array(tree.depths)
        return positions_T


def _span_plans(
    layout: _Layout,
    store: KeyStore,
    tree: LabelTree | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[SpanPlan, SpanPlan]:
    """One span for each prompt and one for its nodes."""
    nodes = layout.nodes
    most = int(layout.used_R.max())
    causal = CausalSpans(most, dtype, device)
    mask_NK = None
    if tree:
        visible_NF = torch.zeros(nodes, most, dtype=dtype, device=device)
        mask_NK = torch.cat((visible_NF, _tree_mask(tree, device).to(dtype)), dim=1)
    spans: list[Span] = []
    last_spans: list[Span] = []
    numbers = (layout.first_R, layout.lengths_R, layout.starts_R, layout.used_R)
    for row, (first, length, start, used) in enumerate(np.stack(numbers, axis=1).tolist()):
        spans += causal.spans(first, length, start, used)
        read = row * (nodes + 1)
        last_spans += causal.spans(read, 1, start, used)
        if mask_NK is not None:
            keys, mask = slice(start, start + used + nodes), mask_NK[:, most - used :]
            at = first + length
            spans.append(Span(slice(at, at + nodes), keys, mask_QK=mask))
            last_spans.append(Span(slice(read + 1, read + 1 + nodes), keys, mask_QK=mask))
    return SpanPlan(store, spans), SpanPlan(store, last_spans)


def _flash_plans(
    layout: _Layout,
    store: KeyStore,
    tree: LabelTree | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[FlashPlan, FlashPlan]:
    """One call for all prompts and one for all nodes."""
    rows, nodes = layout.rows, layout.nodes
    most = int(layout.used_R.max()) + nodes
    each_R1 = np.arange(rows + 1)
    asked_RN = each_R1[:-1, None] * (nodes + 1) + np.arange(1, nodes + 1)
    ends, starts, used, every, each, nodes_RN, queries_RN = to_device(
        device,
        np.append(layout.first_R, layout.tokens_R.sum()),
        np.append(layout.starts_R, 0),
        layout.used_R,
        layout.used_R + nodes,
        each_R1,
        layout.nodes_RN,
        asked_RN,
    )
    ends, starts, used, every, each = (x.int() for x in (ends, starts, used, every, each))
    # Nodes are queries of this call too, since they lie between prompts; their output is replaced.
    prompts = FlashCall(ends, starts, every, int(layout.tokens_R.max()), most, causal=True)
    read = FlashCall(each * (nodes + 1), starts, used, nodes + 1, most)
    trees = last_trees = None
    if tree:
        # At least two, because with one the operator orders the sums of weights otherwise.
        to_prompts = FlashCall(each * nodes, starts, used, max(2, nodes), most)
        mask_NN = _tree_mask(tree, device)
        trees = TreeAttention(nodes_RN, nodes_RN, to_prompts, mask_NN)
        last_trees = TreeAttention(nodes_RN, queries_RN, to_prompts, mask_NN)
    everything = slice(None)
    return (
        FlashPlan(store, [(everything, prompts)], trees),
        FlashPlan(store, [(everything, read)], last_trees),
    )


@lru_cache(maxsize=64)
def _tree_mask(tree: LabelTree, device: torch.device) -> torch.Tensor:
    """0 where a node attends to a node, -inf elsewhere, [N, N] in float32."""
    mask_NN = torch.full((len(tree), len(tree)), -torch.inf)
    for node, lineage in enumerate(tree.lineage):
        # Siblings must not attend to each other, only to their own lineage.
        mask_NN[node, list(lineage)] = 0
    return mask_NN.to(device)
