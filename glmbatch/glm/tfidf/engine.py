"""The engine of a TF-IDF classifier: ids of n-grams in, the logits of its labels out. No torch.

Shapes: U different n-grams of one text, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from glmbatch.errors import InputError
from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
)
from glmbatch.glm.tfidf.model import TfidfModel


class TfidfEngine:
    """Answers requests one after the other, in the caller's thread. Threads may share it."""

    def __init__(self, model: TfidfModel) -> None:
        self._model = model

    @property
    def arena_bytes(self) -> int:
        """0: nothing is generated."""
        return 0

    def classify(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyResult]:
        """Yield the logits of each request, which has no labels of its own."""
        for request in requests:
            for question in (request, *request.beside):
                if question.label_ids is not None:
                    raise InputError("TF-IDF knows only its own labels. Leave label_ids out.")
                yield ClassifyResult(question.index, self._logits(question.prompt_ids))

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[GenerateResult]:
        """Raise InputError: such a model writes nothing."""
        raise InputError("TF-IDF cannot generate. Set another model for this step.")

    def close(self) -> None:
        """Nothing is to be freed."""

    def _logits(self, ids: Sequence[int]) -> tuple[float, ...]:
        model = self._model
        ids_U, count_U = np.unique(np.array(ids, np.int64), return_counts=True)
        if not ids_U.size:  # no n-gram is known: what the labels' shares in training say
            return tuple(model.bias_L.astype(float).tolist())
        # In float64, as in the training.
        vector_U = (1 + np.log(count_U)) * model.idf_F[ids_U]
        vector_U /= np.sqrt(vector_U @ vector_U)
        logits_L = vector_U @ model.weights_FL[ids_U] + model.bias_L
        return tuple(logits_L.tolist())
