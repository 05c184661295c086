"""The interface between steps and the model: token ids in, scores or token ids out.

Loads no torch. The engine never sees text, rows or files. Several threads may submit requests at
once; the engine batches across them and returns each result to its caller as soon as it is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Advance(NamedTuple):
    """What follows a chosen token: the last `dropped` ids go, then `ids` are forced.

    With `ended`, the answer ends with them.
    """

    dropped: int = 0
    ids: Sequence[int] = ()
    ended: bool = False


class FormState(Protocol):
    """How far an answer in a given form is; `was_cut` once a part of it was too long."""

    was_cut: bool

    def begin(self) -> Sequence[int]:
        """The ids with which the answer begins."""

    def allowed(self) -> bytes:
        """The tokens that may come next, one bit for each id, the lowest bit first."""

    def advance(self, token: int) -> Advance:
        """Take the chosen `token`; returns what follows it. ValueError if the form cannot go on."""


class AnswerForm(Protocol):
    """The form of one answer: which of its tokens the model chooses, and from which.

    `longest` is the most ids that the answer has, forced ones included.
    """

    @property
    def longest(self) -> int:
        """The most ids of an answer."""

    def begin(self) -> FormState:
        """The state of a new answer."""


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """One prompt to score.

    `label_ids` has the token ids of each label, for zero-shot scoring; None uses the checkpoint's
    trained head. `shared_tokens` is the number of leading ids that many requests have in common
    (the template before the text): their keys and values are computed once. It affects speed, and
    scores only by rounding.

    `beside` are other questions about the same text, each with a result of its own. What they and
    this one begin with is computed once. They have none beside them.
    """

    # Chosen by the caller and unique within one call, because results arrive in any order.
    index: int
    prompt_ids: Sequence[int]
    label_ids: tuple[tuple[int, ...], ...] | None = None
    shared_tokens: int = 0
    beside: tuple[ClassifyRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """Scores of one prompt, or the `error` that prevented them.

    `scores` are the logits of the trained head, or the log-likelihood of each whole label (natural
    logarithm, summed over its tokens). With an `error` they are empty; the rest of the batch is
    unaffected.
    """

    index: int
    # In the order of the head's rows, or of the request's labels.
    scores: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue.

    `temperature` 0 is greedy. `seed` (64 bits) determines the draws of this request, whatever its
    batch. `should_stop` is called after each token with all generated ids so far, and must not keep
    that list. `log_probs` asks for those of the result. `shared_tokens` is as in `ClassifyRequest`.
    With a `form`, the answer ends where the form does, `max_tokens` is at least `form.longest`, and
    penalties, `min_tokens` and `should_stop` are unused.

    `beside` are other requests about the same text, each with a result of its own. What their
    prompts and this one begin with is computed once. They have none beside them.
    """

    index: int
    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    # As in transformers: 1.0 and 0 keep all tokens.
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    # As in transformers, over the ids of the prompt and of the answer: 1.0 and 0 change nothing.
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    # The end token cannot be chosen before so many tokens. `should_stop` is asked all the same.
    min_tokens: int = 0
    log_probs: bool = False
    should_stop: Callable[[Sequence[int]], bool] | None = None
    shared_tokens: int = 0
    form: AnswerForm | None = None
    beside: tuple[GenerateRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """The generated `ids`, without the end token, and why generation ended.

    `finish_reason` is "stop" (end token or `should_stop`), "length" (`max_tokens`, or the model's
    last position) or "error", with the reason in `error` and no ids. `log_probs` has one number for
    each of `ids` (natural logarithm), under the model's own distribution: before penalties,
    temperature and cuts. Empty unless the request asked for them. `forced` counts the ids that the
    request's form gave; "length" then says that a part of the answer was cut. Their log-probability
    is nan, and those of the others are among the tokens that the form allowed.
    """

    index: int
    ids: tuple[int, ...]
    finish_reason: str
    error: str | None = None
    log_probs: tuple[float, ...] = ()
    forced: int = 0


def not_finite(dtype: str, tokens: int = 0) -> str:
    """The `error` of a request whose scores became nan or infinite after `tokens` generated tokens.

    In half precision, the cause is an overflow, since weights are checked to be finite before they
    are loaded. The message then names a wider dtype.
    """
    wider = {"float16": "float32 or bfloat16", "bfloat16": "float32"}.get(dtype)
    advice = f": set model.dtype to {wider}" if wider else ""
    place = f" after {tokens} tokens" if tokens else ""
    return f"the model's scores are not finite in {dtype}{place}{advice}"


class Engine(Protocol):
    """All that steps use of a model. Safe to call from several threads.

    Returns one result per request as soon as it is ready, matched by `index` (unique within a
    call). A failure of one request, such as non-finite scores, is in the `error` of its result.
    Raises TransientError if the machine fails, and InputError if the model cannot run such requests
    at all.
    """

    @property
    def arena_bytes(self) -> int:
        """Memory of the device that holds keys and values of generations now."""

    def classify(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyResult]:
        """Yield the scores of each request. Closing the iterator early cancels the rest."""

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[GenerateResult]:
        """Yield the answer to each request. Closing the iterator early cancels the rest."""

    def close(self) -> None:
        """Stop and free the device. Raises TransientError in callers that wait for a result."""
