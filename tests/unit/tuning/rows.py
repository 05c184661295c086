"""Labelled rows that a small model learns in seconds. Loads no torch: conftest imports it first."""

from __future__ import annotations

import random
from typing import Any

WORDS = {
    "good": ["很好", "great", "love"],
    "bad": ["糟糕", "awful", "hate"],
    "so so": ["一般", "okay", "meh"],
}
GOOD = {"training__epochs": 6}  # enough to learn the rows
FILLERS = ["the", "a", "room", "food", "服务", "price", "and", "was", "it", "day"]


def labelled(rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """Texts in which one word decides the label, and the labels."""
    dice = random.Random(seed)
    labels = [dice.choice(list(WORDS)) for _ in range(rows)]
    texts = []
    for label in labels:
        words = [dice.choice(FILLERS) for _ in range(dice.randint(2, 9))]
        words.insert(dice.randrange(len(words) + 1), dice.choice(WORDS[label]))
        texts.append(f"{' '.join(words)} {dice.randrange(10**6)}")
    return {"text": texts, "label": labels}


def without_label(label: str) -> dict[str, list[Any]]:
    """The 240 rows of the `tune` fixture without those of one label."""
    rows = labelled(240)
    pairs = [pair for pair in zip(rows["text"], rows["label"], strict=True) if pair[1] != label]
    return {"text": [text for text, _ in pairs], "label": [name for _, name in pairs]}
