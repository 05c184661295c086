"""All questions behind one text, and all labels of each, as one tree of tokens.

What several of them begin with is computed once. No tensors.

A branch is one question: the ids that follow the common text, and its labels; None if a trained
head answers it.

Shapes: B rows of a batch, S reads of the tree, M the largest number of its children, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Ids = tuple[int, ...]
Labels = tuple[Ids, ...]
Branch = tuple[Ids, Labels | None]
Path = tuple[tuple[int, int], ...]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class LabelTree:
    """The inner nodes of the trie of all branches, parents before children.

    The last token of a label is only scored, never fed to the model, so labels of one token have no
    nodes. Row 0 is the last token of the prompt, row 1 + n is node n. Except for `paths` and
    `ends`, nothing depends on the order of branches and labels.

    `tokens`, `depths`: for each node, its token and its distance from the end of the prompt, from 1
    `lineage`: for each node, the nodes that it attends to: its ancestors and itself
    `reads`: the rows that are scored, ascending
    `children`: for each of `reads`, the tokens that continue a label from there, ascending
    `paths`: for each branch and each of its labels, in the order given, the (index in `reads`,
    index of child) pairs whose log-probabilities add up to its score
    `ends`: for each branch, the index in `reads` of its last token, where a head is read
    """

    tokens: Ids
    depths: tuple[int, ...]
    lineage: tuple[tuple[int, ...], ...]
    reads: tuple[int, ...]
    children: tuple[Ids, ...]
    paths: tuple[tuple[Path, ...], ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@lru_cache(maxsize=64)
def label_tree(branches: tuple[Branch, ...]) -> LabelTree:
    """The tree of `branches`. Cached, because all rows of a step have the same questions."""
    # For each scored beginning of a branch with one of its labels, the tokens that follow it.
    continued: dict[Ids, set[int]] = {}
    heads: set[Ids] = {()}
    for suffix, labels in branches:
        heads.update(suffix[:end] for end in range(1, len(suffix) + 1))
        continued.setdefault(suffix, set())
        for label in labels or ():
            for depth, token in enumerate(label):
                heads.add(suffix + label[:depth])
                continued.setdefault(suffix + label[:depth], set()).add(token)
    ordered = sorted(heads)  # lexicographic: a parent sorts before its children
    row_of = {head: row for row, head in enumerate(ordered)}
    reads = sorted(continued)
    read_of = {head: read for read, head in enumerate(reads)}
    children = tuple(tuple(sorted(continued[head])) for head in reads)
    nodes = ordered[1:]  # the first is the empty beginning: the prompt itself
    paths = []
    for suffix, labels in branches:
        paths.append(tuple(_path(suffix, label, read_of, children) for label in labels or ()))
    return LabelTree(
        tokens=tuple(head[-1] for head in nodes),
        depths=tuple(len(head) for head in nodes),
        lineage=tuple(_lineage(head, row_of) for head in nodes),
        reads=tuple(row_of[head] for head in reads),
        children=children,
        paths=tuple(paths),
        ends=tuple(read_of[suffix] for suffix, _ in branches),
    )


def _lineage(head: Ids, row_of: dict[Ids, int]) -> tuple[int, ...]:
    return tuple(row_of[head[:end]] - 1 for end in range(1, len(head) + 1))


def _path(suffix: Ids, label: Ids, read_of: dict[Ids, int], children: Sequence[Ids]) -> Path:
    path = []
    for depth, token in enumerate(label):
        read = read_of[suffix + label[:depth]]
        path.append((read, children[read].index(token)))
    return tuple(path)


def question_scores(tree: LabelTree, read: Array, has_head: bool) -> list[Array]:
    """For each branch the scores [B, L], from what was `read` behind B rows, [B, S, ...].

    The logits of a head at the end of the branch, or the log-likelihood of each label in float64.
    """
    if has_head:
        return [read[:, end] for end in tree.ends]
    return [_label_scores(paths, read) for paths in tree.paths]


def _label_scores(paths: Sequence[Path], log_probs_BSM: Array) -> Array:
    """The log-likelihood of each label of a branch, [B, L]."""
    scores = []
    for path in paths:
        # Along it the sum has one order, so scores do not depend on the order of labels.
        reads, children = zip(*path, strict=True)
        scores.append(log_probs_BSM[:, reads, children].sum(axis=1, dtype=np.float64))
    return np.stack(scores, axis=1)
