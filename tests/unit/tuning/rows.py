"""Labelled rows that a small model learns in seconds."""

from __future__ import annotations

import random
from typing import Any

WORDS = {
    "good": ["很好", "great", "love"],
    "bad": ["糟糕", "awful", "hate"],
    "so so": ["一般", "okay", "meh"],
}


def labelled(rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """Texts with one telling word among others, and their labels."""
    dice = random.Random(seed)
    labels = [dice.choice(list(WORDS)) for _ in range(rows)]
    noise = ["the", "a", "room", "food", "服务", "price", "and", "was", "it", "day"]
    texts = []
    for label in labels:
        words = [dice.choice(noise) for _ in range(dice.randint(2, 9))]
        words.insert(dice.randrange(len(words) + 1), dice.choice(WORDS[label]))
        texts.append(f"{' '.join(words)} {dice.randrange(10**6)}")
    return {"text": texts, "label": labels}
