"""Noise on token ids, so that a small model that has seen few texts cannot learn them by heart."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from glmbatch.glm.tokenizer import Tokenizer

HIDDEN_ID = 1  # the begin token, which no prompt has
Splits = Mapping[int, Sequence[tuple[int, int]]]


def piece_splits(tokenizer: Tokenizer) -> Splits:
    """For each piece, the pairs of pieces that spell the same."""
    pieces = tokenizer.pieces()
    found = {}
    for piece, at in pieces.items():
        pairs = ((pieces.get(piece[:cut]), pieces.get(piece[cut:])) for cut in range(1, len(piece)))
        if known := [
            (left, right) for left, right in pairs if left is not None and right is not None
        ]:
            found[at] = known
    return found


def disturbed(ids: Sequence[int], splits: Splits, share: float, dice: random.Random) -> list[int]:
    """`ids` with a `share` of the pieces spelled by shorter ones, and half of that hidden; the last stays in sight.

    As subword regularization (https://arxiv.org/abs/1804.10959): a rare word is learned by its parts too.
    """
    result: list[int] = []
    for at in ids:
        pairs = splits.get(at)
        result += dice.choice(pairs) if pairs and dice.random() < share else (at,)
    last = len(result) - 1
    return [
        HIDDEN_ID if at < last and dice.random() < share / 2 else each
        for at, each in enumerate(result)
    ]
