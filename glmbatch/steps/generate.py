"""A generate step: text, finish reason, tokens. Token ids in, columns out; no tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Self

import pyarrow as pa

from glmbatch.glm.engine.protocol import Engine, GenerateRequest, GenerateResult
from glmbatch.glm.stop_texts import stop_at
from glmbatch.glm.tokenizer import Tokenizer, clean_answer
from glmbatch.ledger.rowkeys import row_seed
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import ExtractStep, GenerateStep
from glmbatch.steps.prompt import Prompt, RowFault, RowPrompts


@dataclass(frozen=True, slots=True)
class Writing:
    """The text that the model wrote for one row.

    `finish_reason` is "stop" or "length". `completion_tokens` counts all generated tokens, also
    those that are cut off at a stop text. The log-probabilities are the sum over the same tokens,
    their mean and the least; None if the step does not ask for them, or there is no token to take
    the mean of. The text is None if the model abstains, because its tokens are too unlikely.

    Of several draws, this is the first with the most frequent text. `agreement` is the share of
    that text, `answers` are the texts of all draws, and `drawn_tokens` counts the tokens of all.
    """

    text: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    log_prob: float | None = None
    mean_log_prob: float | None = None
    least_log_prob: float | None = None
    agreement: float | None = None
    answers: tuple[str | None, ...] = ()
    drawn_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Confidence:
    """The log-probabilities of tokens: their sum, their mean and the least.

    Without a token there is no mean and no least.
    """

    log_prob: float
    mean_log_prob: float | None
    least_log_prob: float | None

    @classmethod
    def of(cls, log_probs: Sequence[float]) -> Self:
        """That of tokens with these `log_probs`."""
        whole = math.fsum(log_probs)
        if not log_probs:
            return cls(whole, None, None)
        return cls(whole, whole / len(log_probs), min(log_probs))

    def is_below(self, least: float | None) -> bool:
        """Whether the mean probability of a token is below `least`, if both are there."""
        if least is None or self.mean_log_prob is None:
            return False
        return math.exp(self.mean_log_prob) < least


def writing_fields(step: GenerateStep) -> list[pa.Field]:
    """The fields of a written answer: text, finish reason, prompt and completion tokens.

    Then the log-probabilities and the vote, if the step asks for them.
    """
    return [field for _, field in _parts(step)]


def _parts(step: GenerateStep) -> list[tuple[str, pa.Field]]:
    """The parts of a `Writing` that are columns, each with its field."""
    columns = Columns(step.name)
    parts = [
        ("text", pa.field(columns.answer, pa.string())),
        ("finish_reason", pa.field(columns.finish_reason, pa.string())),
        ("prompt_tokens", pa.field(columns.prompt_tokens, pa.int32())),
        ("completion_tokens", pa.field(columns.completion_tokens, pa.int32())),
    ]
    if step.log_probs or step.tells_confidence:
        parts.append(("log_prob", pa.field(columns.log_prob, pa.float64())))
    if step.tells_confidence:
        parts.append(("mean_log_prob", pa.field(columns.mean_log_prob, pa.float64())))
        parts.append(("least_log_prob", pa.field(columns.least_log_prob, pa.float64())))
    if step.n > 1:
        parts.append(("agreement", pa.field(columns.agreement, pa.float64())))
        parts.append(("answers", pa.field(columns.answers, pa.list_(pa.string()))))
    return parts


def writing_columns(step: GenerateStep, writings: Sequence[Writing | None]) -> list[list[object]]:
    """The values of each field of `writing_fields`, row by row; None where nothing was written."""
    columns = []
    for part, _ in _parts(step):
        columns.append(
            [None if writing is None else getattr(writing, part) for writing in writings]
        )
    return columns


def ask_writings(
    steps: Sequence[tuple[GenerateStep, bool]],
    rows: Iterable[RowPrompts],
    engine: Engine,
    tokenizer: Tokenizer,
) -> Iterator[tuple[int, bytes, Writing | RowFault]]:
    """Ask the engine to continue the prompts of each row; yield the answers in any order.

    Each comes with the number of its step and its row key. A prompt on which the model failed has a
    RowFault. Each of `steps` comes with its `chat`, as for `write_up`.
    """
    asked: list[tuple[int, bytes, int, int]] = []  # the engine numbers its requests
    stops = [stop_at(step.stop, tokenizer, continues=not chat) for step, chat in steps]

    def requests() -> Iterator[GenerateRequest]:
        for row in rows:
            of_row = []
            for number, key, prompt in row:
                for draw in range(steps[number][0].n):
                    step, stop = steps[number][0], stops[number]
                    of_row.append(
                        _request(step, len(asked), key, prompt, draw=draw, should_stop=stop)
                    )
                    asked.append((number, key, draw, len(prompt.ids)))
            yield replace(of_row[0], beside=tuple(of_row[1:]))

    draws: dict[tuple[int, bytes], dict[int, Writing]] = {}
    failed: set[tuple[int, bytes]] = set()
    for index, result in ask_by_number(engine, requests()):
        number, key, draw, prompt_tokens = asked[index]
        step, chat = steps[number]
        if isinstance(result, RowFault):
            # One reason for the row, however many of its draws failed.
            if (number, key) not in failed:
                failed.add((number, key))
                yield number, key, result
            continue
        of_row = draws.setdefault((number, key), {})
        of_row[draw] = write_up(step, result, prompt_tokens, tokenizer, chat=chat)
        if len(of_row) == step.n:
            del draws[number, key]
            writings = [of_row[draw] for draw in range(step.n)]
            yield number, key, without_unsure(step, elect(writings))


def _request(  # noqa: PLR0913 - as `request_of`, and the step's stop rule
    step: GenerateStep,
    index: int,
    key: bytes,
    prompt: Prompt,
    *,
    draw: int,
    should_stop: Callable[[Sequence[int]], bool] | None,
) -> GenerateRequest:
    return replace(
        request_of(step, index, key, prompt, step.max_tokens, draw=draw),
        repetition_penalty=step.repetition_penalty,
        no_repeat_ngram_size=step.no_repeat_ngram_size,
        min_tokens=step.min_tokens,
        log_probs=step.log_probs or step.tells_confidence,
        should_stop=should_stop,
    )


def elect(writings: Sequence[Writing]) -> Writing:
    """The most frequent text of several draws of one row; of equally frequent ones, the first.

    Texts are compared without blanks at their ends. One draw is its own answer.
    """
    if len(writings) == 1:
        return writings[0]
    texts = [(writing.text or "").strip() for writing in writings]
    votes = Counter(texts)
    winner = max(votes, key=votes.__getitem__)  # the first of the most frequent ones
    return replace(
        writings[texts.index(winner)],
        agreement=votes[winner] / len(writings),
        answers=tuple(writing.text for writing in writings),
        drawn_tokens=sum(writing.completion_tokens for writing in writings),
    )


def request_of(  # noqa: PLR0913 - a prompt, its number and key, and what bounds its answer
    step: GenerateStep | ExtractStep,
    index: int,
    key: bytes,
    prompt: Prompt,
    max_tokens: int,
    *,
    draw: int = 0,
) -> GenerateRequest:
    """The request to continue `prompt` by at most `max_tokens`, drawn as `step` says."""
    return GenerateRequest(
        index,
        prompt.ids,
        max_tokens,
        temperature=step.temperature,
        top_p=step.top_p,
        top_k=step.top_k,
        seed=row_seed(step.seed, key, draw),  # so sampling does not depend on the batch
        shared_tokens=prompt.shared_tokens,
    )


def ask_by_number(
    engine: Engine, requests: Iterable[GenerateRequest]
) -> Iterator[tuple[int, GenerateResult | RowFault]]:
    """Each result with its index, in any order; a RowFault where the model failed."""
    for result in engine.generate(requests):
        fault = None if result.error is None else RowFault("model_failed", result.error)
        yield result.index, fault or result


def write_up(
    step: GenerateStep,
    result: GenerateResult,
    prompt_tokens: int,
    tokenizer: Tokenizer,
    *,
    chat: bool = True,
) -> Writing:
    """The text that the model wrote to one prompt, however unsure of it; cut before a stop text.

    With the numbers that the step asks for. `prompt_tokens` is the number of the prompt's token
    ids. Without `chat`, the answer is the text that continues the prompt: its blanks and line ends
    are part of it.
    """
    ids, finish_reason = result.ids, result.finish_reason
    # An incomplete last character is dropped only if the length limit cut it off.
    text = tokenizer.decode(ids, cut=finish_reason == "length", continues=not chat)
    ends = [text.find(stop) for stop in step.stop if stop in text]
    if ends:
        # The one that is first in the text, not in the list.
        text, finish_reason = text[: min(ends)], "stop"
    text = clean_answer(text) if chat else text
    writing = Writing(text, finish_reason, prompt_tokens, len(ids), drawn_tokens=len(ids))
    if not (step.log_probs or step.tells_confidence):
        return writing
    sure = Confidence.of(result.log_probs)
    if not step.tells_confidence:
        return replace(writing, log_prob=sure.log_prob)
    return replace(writing, **asdict(sure))


def without_unsure(step: GenerateStep, writing: Writing) -> Writing:
    """`writing` without its text if the model is less sure of it than the step asks for."""
    if step.abstain_below is None or writing.log_prob is None:
        return writing
    sure = Confidence(writing.log_prob, writing.mean_log_prob, writing.least_log_prob)
    return replace(writing, text=None) if sure.is_below(step.abstain_below) else writing
