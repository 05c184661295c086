"""Several prompts, and the label trees after them, as one row of tokens: ids, positions, and who sees whom.

Row order: all prompts, then all trees. Read order: the last token of each prompt, then all nodes.

Shapes: T tokens of the row, R of them read, Q queries and K keys of one span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from glmbatch.glm.model import varlen
from glmbatch.glm.model.attention import PackedPlan, Piece, Span, Store
from glmbatch.glm.model.kv_cache import KvPrefix
from glmbatch.glm.model.label_tree import LabelTree
from glmbatch.glm.model.varlen import PromptCall, TreeCall

# Behind a prefix, queries are masked in blocks of this size: the mask stays below 70 MB at 32k places.
QUERY_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Segment:
    """One prompt of a packed row: its own ids, those after the shared prefix, and the labels that may follow it."""

    ids: Sequence[int]
    tree: LabelTree | None = None

    def __len__(self) -> int:
        return len(self.ids) + len(self.tree or ())


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward. `last_plan` is for the last layer, where only the tokens that are read ask."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    reads_R: torch.Tensor
    plan: PackedPlan
    last_plan: PackedPlan


def pack(
    segments: Sequence[Segment],
    prefix: KvPrefix | None,
    store: Store | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Packed:
    """One row of all `segments`, each after `prefix`; `store` is handed every layer's keys and values."""
    start = 0 if prefix is None else prefix.next_position
    lengths = [len(segment.ids) for segment in segments]
    ends = list(accumulate(lengths))
    ids = [token for segment in segments for token in segment.ids]
    positions = [place for length in lengths for place in range(start, start + length)]
    for segment, length in zip(segments, lengths, strict=True):
        if segment.tree:
            ids += segment.tree.tokens
            positions += [start + length - 1 + depth for depth in segment.tree.depths]
    reads = [end - 1 for end in ends] + list(range(ends[-1], len(ids)))
    row = _Row(segments, lengths, ends, 0 if prefix is None else prefix.places, device, dtype)
    pieces, last_pieces = row.all_pieces()
    return Packed(
        ids_T=torch.tensor(ids, device=device),
        positions_T=torch.tensor(positions, device=device),
        reads_R=torch.tensor(reads, device=device),
        plan=PackedPlan(pieces, prefix, store),
        last_plan=PackedPlan(last_pieces, prefix, store),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """Who sees whom in one packed row whose keys come after `places` of the prefix."""

    segments: Sequence[Segment]
    lengths: Sequence[int]
    ends: Sequence[int]
    places: int
    device: torch.device
    dtype: torch.dtype

    def all_pieces(self) -> tuple[list[Piece], list[Piece]]:
        """For all layers but the last, where every token asks; for the last, where those do that are read."""
        masks = [self._tree_mask(at, segment.tree) for at, segment in enumerate(self.segments)]
        trees, last_trees = (
            self._tree_spans(masks, self.ends[-1]),
            self._tree_spans(masks, len(self.segments)),
        )
        if varlen.serves(self.device, self.dtype):
            pieces, last_pieces = (
                [self._prompt_call(self.lengths)],
                [self._prompt_call([1] * len(self.lengths))],
            )
            if trees:
                return [*pieces, TreeCall(trees, self.device)], [
                    *last_pieces,
                    TreeCall(last_trees, self.device),
                ]
            return [*pieces], [*last_pieces]
        return [*self._prompt_spans(), *trees], [*self._last_spans(), *last_trees]

    def _prompt_spans(self) -> list[Span]:
        """Every token of each prompt sees the prefix and its prompt up to itself."""
        if self.places:
            return self._masked_spans()
        prompts = [
            slice(end - length, end) for length, end in zip(self.lengths, self.ends, strict=True)
        ]
        return [Span(prompt, (prompt,), causal=True) for prompt in prompts]

    def _last_spans(self) -> list[Span]:
        """The last token of each prompt, alone, sees the prefix and its whole prompt."""
        return [
            Span(slice(at, at + 1), self._keys_before(at, end)) for at, end in enumerate(self.ends)
        ]

    def _masked_spans(self) -> list[Span]:
        """Causal attention knows no keys ahead of the queries' own: behind a prefix the end of the keys is masked."""
        most = self.places + max(self.lengths)
        corner_QK = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=self.dtype).triu(1)
        mask_QK = torch.cat(
            (torch.zeros(QUERY_BLOCK, most, dtype=self.dtype), corner_QK), dim=1
        ).to(self.device)
        spans = []
        for at, (length, end) in enumerate(zip(self.lengths, self.ends, strict=True)):
            for first in range(end - length, end, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, end)
                ahead = self.places + first - (end - length)
                mask = mask_QK[: last - first, most - ahead : most + last - first]
                spans.append(Span(slice(first, last), self._keys_before(at, last), mask_QK=mask))
        return spans

    def _tree_spans(self, masks: Sequence[torch.Tensor | None], first_query: int) -> list[Span]:
        """The nodes of each tree see the prefix, their prompt, and those nodes that they continue."""
        spans = []
        first_key = self.places + self.ends[-1]
        for at, mask_QK in enumerate(masks):
            if mask_QK is None:
                continue
            nodes = len(mask_QK)
            keys = (*self._keys_before(at, self.ends[at]), slice(first_key, first_key + nodes))
            spans.append(Span(slice(first_query, first_query + nodes), keys, mask_QK=mask_QK))
            first_query, first_key = first_query + nodes, first_key + nodes
        return spans

    def _tree_mask(self, at: int, tree: LabelTree | None) -> torch.Tensor | None:
        """What is added to the scores of a tree's nodes: 0 where a node sees, -inf where it does not."""
        if not tree:
            return None
        before = self.places + self.lengths[at]
        mask_QK = torch.zeros(len(tree), before + len(tree), dtype=self.dtype)
        mask_QK[:, before:] = -torch.inf
        for node, seen in enumerate(tree.lineage):
            mask_QK[node, [before + other for other in seen]] = 0
        return mask_QK if varlen.serves(self.device, self.dtype) else mask_QK.to(self.device)

    def _keys_before(self, at: int, end: int) -> tuple[slice, ...]:
        """The prefix and prompt `at` up to place `end` of the row."""
        own = slice(self.places + self.ends[at] - self.lengths[at], self.places + end)
        return (slice(0, self.places), own) if self.places else (own,)

    def _prompt_call(self, queries: Sequence[int]) -> PromptCall:
        key_index = None
        if self.places:
            seen = [self._keys_before(at, end) for at, end in enumerate(self.ends)]
            key_index = [
                key for pieces in seen for piece in pieces for key in range(piece.start, piece.stop)
            ]
        keys = [self.places + length for length in self.lengths]
        return PromptCall(list(zip(queries, keys, strict=True)), key_index, self.device)
