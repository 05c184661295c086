"""All questions behind one text, and all labels of each, as one tree of tokens.

What several of them begin with is computed once. No tensors.

A branch is one question: the ids that follow the common text, and its labels; None if a trained
head answers it.

Shapes: B rows of a batch, S reads of the tree, M the largest number of its children, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
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
    `closes`: for each node, the first node behind its last descendant. Nodes are in the order of a
    walk, so node n attends to the nodes a <= n whose `closes` is above n: its ancestors and itself
    `reads`: the rows that are scored, ascending
    `children`: for each of `reads`, the tokens that continue a label from there, ascending
    `paths`: for each branch and each of its labels, in the order given, the (index in `reads`,
    index of child) pairs whose log-probabilities add up to its score
    `ends`: for each branch, the index in `reads` of its last token, where a head is read
    """

    tokens: Ids
    depths: tuple[int, ...]
    closes: tuple[int, ...]
    reads: tuple[int, ...]
    children: tuple[Ids, ...]
    paths: tuple[tuple[Path, ...], ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True, eq=False)
class _Node:
    """A token of a trie while it is built. `continued` has the tokens that follow it in labels."""

    token: int = -1
    depth: int = 0
    below: dict[int, _Node] = field(default_factory=dict)
    is_read: bool = False
    continued: set[int] = field(default_factory=set)
    row: int = 0
    close: int = 0  # the row behind the last node below it
    read: int = -1
    places: dict[int, int] = field(default_factory=dict)  # of `continued`, in ascending order

    def child(self, token: int) -> _Node:
        """The node of `token` below this one, which is made on first use."""
        if token not in self.below:
            self.below[token] = _Node(token, self.depth + 1)
        return self.below[token]


@lru_cache(maxsize=64)
def label_tree(branches: tuple[Branch, ...]) -> LabelTree:
    """The tree of `branches`. Cached, because all rows of a step have the same questions."""
    root = _Node()
    ends: list[_Node] = []
    walks: list[list[_Walk]] = []
    for suffix, labels in branches:
        end = reduce(_Node.child, suffix, root)
        end.is_read = True
        ends.append(end)
        walks.append([_walk(end, label) for label in labels or ()])
    rows = _in_order(root)
    reads = [node for node in rows if node.is_read]
    for read, node in enumerate(reads):
        node.read = read
        node.places = {token: place for place, token in enumerate(sorted(node.continued))}
    paths = []
    for walked in walks:
        paths.append(tuple(map(_path, walked)))
    nodes = rows[1:]  # the first is the prompt itself
    return LabelTree(
        tokens=tuple(node.token for node in nodes),
        depths=tuple(node.depth for node in nodes),
        closes=tuple(node.close - 1 for node in nodes),
        reads=tuple(node.row for node in reads),
        children=tuple(tuple(node.places) for node in reads),
        paths=tuple(paths),
        ends=tuple(node.read for node in ends),
    )


_Walk = list[tuple[_Node, int]]


def _walk(node: _Node, label: Ids) -> _Walk:
    """Each token of `label` behind `node`, with the node that it is scored at."""
    walk = []
    for token, is_last in zip(label, [*[False] * (len(label) - 1), True], strict=False):
        node.is_read = True
        node.continued.add(token)
        walk.append((node, token))
        if not is_last:
            node = node.child(token)
    return walk


def _path(walk: _Walk) -> Path:
    return tuple((node.read, node.places[token]) for node, token in walk)


def _in_order(root: _Node) -> list[_Node]:
    """All nodes, each before those below it and these by token; sets `row` and `close`."""
    rows: list[_Node] = []
    waiting = [root]
    while waiting:  # no recursion: a branch may be as long as a text
        node = waiting.pop()
        node.row = len(rows)
        rows.append(node)
        waiting += [node.below[token] for token in sorted(node.below, reverse=True)]
    for node in reversed(rows):
        last = node.below[max(node.below)] if node.below else None
        node.close = node.row + 1 if last is None else last.close
    return rows


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
