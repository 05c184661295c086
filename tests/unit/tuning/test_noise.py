"""Noise changes how a text is spelled, not what it says."""

from __future__ import annotations

import random

from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.tuning.noise import HIDDEN_ID, disturbed, piece_splits
from tests.conftest import CAUSAL

TEXT = "the room was wonderful and the service too; 房间很好，服务也不错"


def test_pieces_are_spelled_by_shorter_ones_of_the_same_text() -> None:
    tokenizer = load_tokenizer(CAUSAL)
    splits = piece_splits(tokenizer)
    assert splits
    names = {at: piece for piece, at in tokenizer.pieces().items()}
    assert all(
        names[left] + names[right] == names[at]
        for at, pairs in splits.items()
        for left, right in pairs
    )


def test_the_share_says_how_much_is_disturbed_and_the_last_token_stays() -> None:
    tokenizer = load_tokenizer(CAUSAL)
    splits, ids = piece_splits(tokenizer), tokenizer.encode_plain([TEXT])[0] * 50
    noisy = disturbed(ids, splits, 0.2, random.Random(1))
    assert noisy == disturbed(ids, splits, 0.2, random.Random(1))
    assert 0.05 < noisy.count(HIDDEN_ID) / len(noisy) < 0.15
    splittable = sum(at in splits for at in ids)
    assert 0.1 * splittable < len(noisy) - len(ids) < 0.3 * splittable
    assert tokenizer.decode(noisy[-1:]) in TEXT
    assert disturbed(ids, splits, 0.0, random.Random(1)) == ids
    assert tokenizer.decode(disturbed(ids, splits, 0.0, random.Random(1))) == tokenizer.decode(ids)
