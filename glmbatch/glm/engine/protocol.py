"""The seam between steps and the model: token ids in, scores or token ids out. Loads no torch.

The engine never sees text, rows or files. Several threads may hand over requests at once; the
engine batches across them and returns each result, as soon as it is ready, to the caller that
asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """One prompt to score.

    `label_ids` holds the token ids of each label, for zero-shot scoring; None asks the checkpoint's
    trained head. `shared_tokens` is the number of leading ids that many requests have in common
    (the template before the text); their keys and values are then computed once. It changes only
    speed, and scores by no more than rounding.
    """

    # Chosen by the caller, and unique within one call: results come in another order.
    index: int
    prompt_ids: Sequence[int]
    label_ids: tuple[tuple[int, ...], ...] | None = None
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """Scores of one prompt, or the `error` for which there are none.

    `scores` are logits of the trained head, or the log-likelihood of each whole label (natural
    logarithm, summed over its tokens). With an `error` they are empty; the rest of the batch is not
    affected.
    """

    index: int
    # Of a head in the order of its rows, of labels in the order asked.
    scores: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue.

    `temperature` 0 is greedy. `seed` (64 bits) fixes the draws of this request in any batch.
    `should_stop` is called after each token with all ids so far; it must not keep the sequence.
    `shared_tokens` is as in `ClassifyRequest`.
    """

    index: int
    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    # As in transformers: 1.0 and 0 keep all tokens.
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    should_stop: Callable[[Sequence[int]], bool] | None = None
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """The generated `ids`, without the end token, and why they end.

    `finish_reason` is "stop" (end token or `should_stop`), "length" (`max_tokens`, or the model's
    last position) or "error"; then there is an `error` and there are no ids.
    """

    index: int
    ids: tuple[int, ...]
    finish_reason: str
    error: str | None = None


def not_finite(dtype: str, tokens: int = 0) -> str:
    """The `error` of a request whose scores are nan or infinite, after `tokens` of an answer.

    The weights are finite, which is checked before they are loaded: in half precision it is an
    overflow.
    """
    wider = {"float16": "float32 or bfloat16", "bfloat16": "float32"}.get(dtype)
    advice = f": set model.dtype to {wider}" if wider else ""
    place = f" after {tokens} tokens" if tokens else ""
    return f"the model's scores are not finite in {dtype}{place}{advice}"


class Engine(Protocol):
    """The whole surface between steps and a model. Safe to call from several threads.

    Results come as they are ready, one for each request, matched by `index` (unique within a call).
    TransientError when the machine fails. A request that alone is at fault (non-finite scores, say)
    comes back with its own `error`.
    """

    def classify(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyResult]:
        """Score each request; closing the iterator early cancels the rest."""

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[GenerateResult]:
        """Continue each request; closing the iterator early cancels the rest."""

    def close(self) -> None:
        """Stop and free the device; callers that wait for a result get a TransientError."""
