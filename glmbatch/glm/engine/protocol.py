"""The seam between steps and the model: token ids in, scores or token ids out. Importing this loads no torch.

The engine never sees text, rows or files. Requests may be handed over from several threads at once; the engine
batches across them and hands each result back, as it is finished, to the caller that asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """One prompt to score.

    `label_ids` holds the token ids of each label for zero-shot scoring; None asks the checkpoint's trained head.
    `shared_tokens` says how many leading ids many requests have in common (the template before the text); their keys
    and values are then computed once. It changes speed, and scores by rounding only.
    """

    index: int
    prompt_ids: Sequence[int]
    label_ids: tuple[tuple[int, ...], ...] | None = None
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """`scores`: logits of the trained head, or the log-likelihood of each whole label (natural log, sum over tokens).

    `error` says why there are none, in which case `scores` is empty; batch-mates are not touched by it.
    """

    index: int
    scores: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue.

    `temperature` 0 is greedy. `seed` (64 bits) fixes the draws of this request whatever its batch-mates.
    `should_stop` is asked after each token with all ids so far; it must not keep the sequence. `shared_tokens` as in
    `ClassifyRequest`.
    """

    index: int
    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    should_stop: Callable[[Sequence[int]], bool] | None = None
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """`ids` without the end token; `finish_reason` is "stop" (end token or should_stop) or "length".

    "length" also when the model's positions ended first. With an `error`, there are no ids and it is "error".
    """

    index: int
    ids: tuple[int, ...]
    finish_reason: str
    error: str | None = None


class Engine(Protocol):
    """The whole surface between steps and a model. Safe to call from several threads.

    Results come as they finish, each once, matched by `index` (unique within one call). TransientError when the
    machine failed. A request that alone is at fault (non-finite scores) comes back with its `error`.
    """

    def classify(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyResult]: ...

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[GenerateResult]: ...

    def close(self) -> None: ...
