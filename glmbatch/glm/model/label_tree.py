"""All labels of a request as one tree of tokens, so that shared beginnings are computed once.

No tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Labels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LabelTree:
    """The inner nodes of the labels' trie, parents first; the labels' order does not matter.

    Row 0 is the end of the prompt, row 1 + n is node n. The last token of a label is never fed to
    the model, so labels of one token have no nodes.

    `tokens`, `depths`: of each node, its token and its distance from the prompt's end, from 1.
    `lineage`: of each node, the nodes that it sees, itself included.
    `children`: of each row, in ascending order, the tokens that continue some label from there.
    `paths`: of each label, as asked, the (row, child) pairs whose log-probabilities make its score.
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
    """The tree of `labels`. Cached, because all rows of a step ask for the same labels."""
    # By each beginning of a label, the tokens that follow it in some label.
    continued: dict[tuple[int, ...], set[int]] = {(): set()}
    for label in labels:
        for depth, token in enumerate(label):
            continued.setdefault(label[:depth], set()).add(token)
    heads = sorted(continued)  # lexicographic: a parent sorts before its children
    row_of = {head: row for row, head in enumerate(heads)}
    children = tuple(tuple(sorted(tokens)) for _, tokens in sorted(continued.items()))
    nodes = heads[1:]  # the first is the empty beginning: the prompt itself
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
