"""Packs several prompts, and the label trees that continue them, into one batch without padding.

Token order: all prompts, then all trees. Read order: the last token of each prompt, then all nodes.

Shapes: T tokens of the batch, R of them read, Q queries and K keys of one attention call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from glmbatch.glm.model import varlen
from glmbatch.glm.model.attention import AttentionCall, PackedPlan, SpanCall, Store
from glmbatch.glm.model.kv_cache import KvPrefix
from glmbatch.glm.model.label_tree import LabelTree
from glmbatch.glm.model.varlen import PromptCall, TreeCall

# With a prefix, queries are masked in blocks of this size, so that the mask stays below 70 MB at
# 32k places.
QUERY_BLOCK = 512


@dataclass(frozen=True, slots=True)
class PackedPrompt:
    """One prompt of a packed batch: its ids after the shared prefix, and the tree of its labels.

    Its length counts the ids and the nodes of the tree.
    """

    ids: Sequence[int]
    tree: LabelTree | None = None

    def __len__(self) -> int:
        return len(self.ids) + len(self.tree or ())


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The input of one forward.

    `reads_R` has the indexes of the tokens whose final states are read. `last_plan` is the
    attention of the last layer, where only those tokens have queries.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    reads_R: torch.Tensor
    plan: PackedPlan
    last_plan: PackedPlan


def pack(
    prompts: Sequence[PackedPrompt],
    prefix: KvPrefix | None,
    store: Store | None,
    device: torch.device,
    dtype: torch.dtype,
) -> PackedBatch:
    """One packed batch of all `prompts`, each after `prefix`.

    `store` receives the keys and values of each layer. `dtype` is the model's, for the masks.
    """
    # Every prompt starts at the same position, since it does not attend to the others.
    start = 0 if prefix is None else prefix.next_position
    lengths = [len(prompt.ids) for prompt in prompts]
    ids: list[int] = []
    positions: list[int] = []
    for prompt in prompts:
        ids += prompt.ids
        positions += range(start, start + len(prompt.ids))
    prompt_tokens = len(ids)
    for prompt, length in zip(prompts, lengths, strict=True):
        if prompt.tree:
            ids += prompt.tree.tokens
            # Siblings share a position: each is a possible next token of the same text.
            last_position = start + length - 1
            positions += [last_position + depth for depth in prompt.tree.depths]
    ends = list(accumulate(lengths))
    reads = [end - 1 for end in ends] + list(range(prompt_tokens, len(ids)))
    prefix_places = 0 if prefix is None else prefix.places
    visibility = _Visibility(prompts, lengths, ends, prefix_places, device, dtype)
    calls, last_calls = visibility.calls()
    return PackedBatch(
        ids_T=torch.tensor(ids, device=device),
        positions_T=torch.tensor(positions, device=device),
        reads_R=torch.tensor(reads, device=device),
        plan=PackedPlan(calls, prefix, store),
        last_plan=PackedPlan(last_calls, prefix, store),
    )


@dataclass(frozen=True, slots=True)
class _Visibility:
    """Which tokens of a packed batch attend to which.

    The keys of the batch follow the `prefix_places` keys of the prefix. `ends[n]` is the index in
    the batch after the last token of prompt n.
    """

    prompts: Sequence[PackedPrompt]
    lengths: Sequence[int]
    ends: Sequence[int]
    prefix_places: int
    device: torch.device
    dtype: torch.dtype

    def calls(self) -> tuple[list[AttentionCall], list[AttentionCall]]:
        """The attention calls of all layers but the last, then those of the last layer.

        In the last layer, only the tokens that are read have queries.
        """
        masks = [self._tree_mask(number, prompt.tree) for number, prompt in enumerate(self.prompts)]
        # In the last layer, queries are indexed among the tokens that are read.
        trees = self._tree_calls(masks, first_query=self.ends[-1])
        last_trees = self._tree_calls(masks, first_query=len(self.prompts))
        calls: list[AttentionCall]
        last_calls: list[AttentionCall]
        if varlen.serves(self.device, self.dtype):
            calls = [self._varlen_call(self.lengths)]
            last_calls = [self._varlen_call([1] * len(self.lengths))]
            if trees:
                calls.append(TreeCall(trees, self.device))
                last_calls.append(TreeCall(last_trees, self.device))
        else:
            calls = [*self._prompt_calls(), *trees]
            last_calls = [*self._last_token_calls(), *last_trees]
        return calls, last_calls

    def _prompt_calls(self) -> list[SpanCall]:
        """Every token of a prompt attends to the prefix and to its prompt up to itself."""
        if self.prefix_places:
            return self._masked_calls()
        calls = []
        for length, end in zip(self.lengths, self.ends, strict=True):
            prompt = slice(end - length, end)
            calls.append(SpanCall(prompt, (prompt,), causal=True))
        return calls

    def _last_token_calls(self) -> list[SpanCall]:
        """The last token of a prompt attends to the prefix and to its whole prompt."""
        calls = []
        for number, end in enumerate(self.ends):
            query = slice(number, number + 1)
            calls.append(SpanCall(query, self._keys_before(number, end)))
        return calls

    def _masked_calls(self) -> list[SpanCall]:
        """Causal attention after a prefix.

        torch's causal mode does not support keys before those of the queries, so a mask hides the
        last keys. One mask serves all blocks: each takes the window of it that fits its keys.
        """
        max_keys = self.prefix_places + max(self.lengths)
        corner_QK = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=self.dtype).triu(1)
        visible_QK = torch.zeros(QUERY_BLOCK, max_keys, dtype=self.dtype)
        mask_QK = torch.cat((visible_QK, corner_QK), dim=1).to(self.device)
        calls = []
        for number, (length, end) in enumerate(zip(self.lengths, self.ends, strict=True)):
            for first in range(end - length, end, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, end)
                ahead = self.prefix_places + first - (end - length)
                mask = mask_QK[: last - first, max_keys - ahead : max_keys + last - first]
                keys = self._keys_before(number, last)
                calls.append(SpanCall(slice(first, last), keys, mask_QK=mask))
        return calls

    def _tree_calls(self, masks: Sequence[torch.Tensor | None], first_query: int) -> list[SpanCall]:
        """The nodes of a tree attend to the prefix, to their prompt and to their lineage."""
        calls = []
        # The keys of the trees follow those of all prompts.
        first_key = self.prefix_places + self.ends[-1]
        for number, mask_QK in enumerate(masks):
            if mask_QK is None:
                continue
            nodes = len(mask_QK)
            own = slice(first_key, first_key + nodes)
            keys = (*self._keys_before(number, self.ends[number]), own)
            calls.append(SpanCall(slice(first_query, first_query + nodes), keys, mask_QK=mask_QK))
            first_query += nodes
            first_key += nodes
        return calls

    def _tree_mask(self, number: int, tree: LabelTree | None) -> torch.Tensor | None:
        """The mask of a tree's nodes: 0 where a node attends to a key, -inf elsewhere."""
        if not tree:
            return None
        before = self.prefix_places + self.lengths[number]
        # Siblings must not attend to each other, only to their own lineage.
        mask_QK = torch.zeros(len(tree), before + len(tree), dtype=self.dtype)
        mask_QK[:, before:] = -torch.inf
        for node, lineage in enumerate(tree.lineage):
            mask_QK[node, [before + ancestor for ancestor in lineage]] = 0
        # `TreeCall` pads the masks on the host and moves them to the device in one copy.
        return mask_QK if varlen.serves(self.device, self.dtype) else mask_QK.to(self.device)

    def _keys_before(self, number: int, end: int) -> tuple[slice, ...]:
        """The keys of the prefix and of prompt `number` up to index `end` of the batch."""
        start = self.ends[number] - self.lengths[number]
        own = slice(self.prefix_places + start, self.prefix_places + end)
        return (slice(0, self.prefix_places), own) if self.prefix_places else (own,)

    def _varlen_call(self, queries: Sequence[int]) -> PromptCall:
        """All prompts in one call, with queries for the last `queries[n]` tokens of prompt n."""
        key_index: list[int] | None = None
        if self.prefix_places:  # without a prefix, the keys are already in the order of the prompts
            key_index = []
            for number, end in enumerate(self.ends):
                for keys in self._keys_before(number, end):
                    key_index += range(keys.start, keys.stop)
        keys_per_prompt = [self.prefix_places + length for length in self.lengths]
        lengths = list(zip(queries, keys_per_prompt, strict=True))
        return PromptCall(lengths, key_index, self.device)
