"""All labels of a request as one tree of tokens, so that shared first tokens are computed once.

No tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Labels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LabelTree:
    """The inner nodes of the trie of the labels, parents before children.

    The last token of a label is only scored, never fed to the model, so labels of one token have no
    nodes. Row 0 is the last token of the prompt, row 1 + n is node n. Except for `paths`, nothing
    depends on the order of the labels.

    `tokens`, `depths`: for each node, its token and its distance from the end of the prompt, from 1
    `lineage`: for each node, the nodes that it attends to: its ancestors and itself
    `children`: for each row, the tokens that continue a label from there, ascending
    `paths`: for each label, in the order given, the (row, index of child) pairs whose
    log-probabilities add up to its score
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    lineage: tuple[tuple[int, ...], ...]
    children: tuple[tuple[int, ...], ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]

    def __len__(self) -> int:
        return len(self.tokens)


@lru_cache(maxsize=64)
def label_tree(labels: Labels) -> LabelTree:
    """The tree of `labels`, each a tuple of token ids.

    Cached, because all rows of a step have the same labels.
    """
    # For each prefix of a label, the tokens that follow it in some label.
    continued: dict[tuple[int, ...], set[int]] = {(): set()}
    for label in labels:
        for depth, token in enumerate(label):
            continued.setdefault(label[:depth], set()).add(token)
    heads = sorted(continued)  # lexicographic: a parent sorts before its children
    row_of = {head: row for row, head in enumerate(heads)}
    children = tuple(tuple(sorted(tokens)) for _, tokens in sorted(continued.items()))
    nodes = heads[1:]  # the first is the empty prefix: the prompt itself
    return LabelTree(
        tokens=tuple(head[-1] for head in nodes),
        depths=tuple(len(head) for head in nodes),
        lineage=tuple(_lineage(head, row_of) for head in nodes),
        children=children,
        paths=tuple(_path(label, row_of, children) for label in labels),
    )


def _lineage(head: tuple[int, ...], row_of: dict[tuple[int, ...], int]) -> tuple[int, ...]:
    return tuple(row_of[head[:end]] - 1 for end in range(1, len(head) + 1))


def _path(
    label: tuple[int, ...], row_of: dict[tuple[int, ...], int], children: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, int], ...]:
    path = []
    for depth, token in enumerate(label):
        row = row_of[label[:depth]]
        path.append((row, children[row].index(token)))
    return tuple(path)
