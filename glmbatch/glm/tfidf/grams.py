"""The n-grams of a text as ids, in place of a tokenizer. No weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from glmbatch.glm.tfidf.model import TfidfModel

# As scikit-learn's vectorizers cut texts, so that both count the same n-grams.
_WORD = re.compile(r"\b\w\w+\b")
_SPACES = re.compile(r"\s\s+")


class Grams:
    """Encodes a text as the ids of its n-grams, each as often as it occurs, known ones only.

    It keeps no state between calls, so threads may share it. A text of any length can be encoded.
    """

    def __init__(self, model: TfidfModel) -> None:
        self._ids = {gram: number for number, gram in enumerate(model.vocabulary)}
        self._in_words = model.units == "words"
        self._lengths = range(model.lengths[0], model.lengths[1] + 1)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; none where no n-gram is known."""
        return [self._known(text.lower()) for text in texts]

    def surely_exceeds(self, text: str, limit: int) -> bool:
        """False: there is no limit."""
        return False

    def _known(self, text: str) -> list[int]:
        ids = self._ids
        return [ids[gram] for gram in self._grams(text) if gram in ids]

    def _grams(self, text: str) -> Iterator[str]:
        if self._in_words:
            words = _WORD.findall(text)
            for length in self._lengths:
                for at in range(len(words) - length + 1):
                    yield " ".join(words[at : at + length])
            return
        text = _SPACES.sub(" ", text)
        for length in self._lengths:
            for at in range(len(text) - length + 1):
                yield text[at : at + length]
