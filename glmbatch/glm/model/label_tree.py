"""All labels of a row as one tree over their tokens, so that what they share is computed once. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Labels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LabelTree:
    """The inner nodes of the labels' trie, parents first, in an order that does not depend on the labels' order.

    Row 0 is the end of the prompt, row 1 + n is node n. A label's last token is never fed to the model, so labels of
    one token have no nodes at all.

    `tokens`, `depths`: for each node its token and how far it is after the prompt's end, from 1.
    `lineage`: for each node the nodes it sees, itself included.
    `children`: for each row, in ascending order, the tokens that continue some label from there.
    `paths`: for each label, as asked, the (row, child) pairs whose log-probabilities add up to its score.
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
    """The tree of `labels`; kept, for all rows of a step ask for the same."""
    continued: dict[tuple[int, ...], set[int]] = {(): set()}
    for label in labels:
        for depth, token in enumerate(label):
            continued.setdefault(label[:depth], set()).add(token)
    heads = sorted(continued)  # lexicographic: a parent sorts before its children
    row_of = {head: row for row, head in enumerate(heads)}
    children = tuple(tuple(sorted(continued[head])) for head in heads)
    nodes = heads[1:]
    return LabelTree(
        tokens=tuple(head[-1] for head in nodes),
        depths=tuple(len(head) for head in nodes),
        lineage=tuple(
            tuple(row_of[head[:end]] - 1 for end in range(1, len(head) + 1)) for head in nodes
        ),
        children=children,
        paths=tuple(_path(label, row_of, children) for label in labels),
    )


def _path(
    label: tuple[int, ...], row_of: dict[tuple[int, ...], int], children: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, int], ...]:
    rows = [row_of[label[:depth]] for depth in range(len(label))]
    return tuple((row, children[row].index(token)) for row, token in zip(rows, label, strict=True))
