"""A generate step: text, finish reason, tokens. Token ids in, columns out; no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Self

import pyarrow as pa

from glmbatch.glm.engine.protocol import Engine, GenerateRequest, GenerateResult
from glmbatch.glm.stop_texts import stop_at
from glmbatch.glm.tokenizer import Tokenizer, clean_answer
from glmbatch.ledger.rowkeys import row_seed
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import ExtractStep, GenerateStep
from glmbatch.steps.prompt import Prompt, RowFault


@dataclass(frozen=True, slots=True)
class Writing:
    """The text that the model wrote for one row.

    `finish_reason` is "stop" or "length". `completion_tokens` counts all generated tokens, also
    those that are cut off at a stop text. The log-probabilities are the sum over the same tokens,
    their mean and the least; None if the step does not ask for them, or there is no token to take
    the mean of. The text is None if the model abstains, because its tokens are too unlikely.
    """

    text: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    log_prob: float | None = None
    mean_log_prob: float | None = None
    least_log_prob: float | None = None


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

    Then the log-probabilities, if the step asks for them.
    """
    columns = Columns(step.name)
    fields = [
        pa.field(columns.answer, pa.string()),
        pa.field(columns.finish_reason, pa.string()),
        pa.field(columns.prompt_tokens, pa.int32()),
        pa.field(columns.completion_tokens, pa.int32()),
    ]
    numbers = [columns.log_prob] if step.log_probs else []
    if step.tells_confidence:
        numbers = columns.of_confidence
    return [*fields, *(pa.field(name, pa.float64()) for name in numbers)]


def writing_columns(step: GenerateStep, writings: Sequence[Writing | None]) -> list[list[object]]:
    """The values of each field of `writing_fields`, row by row; None where nothing was written."""
    columns: list[list[object]] = [[] for _ in writing_fields(step)]
    nothing = (None,) * len(columns)
    for writing in writings:
        values = nothing if writing is None else astuple(writing)
        for column, value in zip(columns, values, strict=False):
            column.append(value)
    return columns


def ask_writings(
    step: GenerateStep,
    prompts: Mapping[bytes, Prompt],
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    chat: bool = True,
) -> Iterator[tuple[bytes, Writing | RowFault]]:
    """Ask the engine to continue each prompt; yield pairs of row key and answer, in any order.

    A prompt on which the model failed has a RowFault. `chat` is as for `write_up`.
    """
    keys = list(prompts)  # the engine numbers its requests
    should_stop = stop_at(step.stop, tokenizer, continues=not chat)
    requests = (
        replace(
            request_of(step, index, key, prompts[key], step.max_tokens),
            repetition_penalty=step.repetition_penalty,
            no_repeat_ngram_size=step.no_repeat_ngram_size,
            min_tokens=step.min_tokens,
            log_probs=step.log_probs or step.tells_confidence,
            should_stop=should_stop,
        )
        for index, key in enumerate(keys)
    )
    for key, result in ask_by_key(engine, keys, requests):
        if isinstance(result, RowFault):
            yield key, result
        else:
            yield key, write_up(step, result, len(prompts[key].ids), tokenizer, chat=chat)


def request_of(
    step: GenerateStep | ExtractStep, index: int, key: bytes, prompt: Prompt, max_tokens: int
) -> GenerateRequest:
    """The request to continue `prompt` by at most `max_tokens`, drawn as `step` says."""
    return GenerateRequest(
        index,
        prompt.ids,
        max_tokens,
        temperature=step.temperature,
        top_p=step.top_p,
        top_k=step.top_k,
        seed=row_seed(step.seed, key),  # so sampling does not depend on the batch
        shared_tokens=prompt.shared_tokens,
    )


def ask_by_key(
    engine: Engine, keys: Sequence[bytes], requests: Iterable[GenerateRequest]
) -> Iterator[tuple[bytes, GenerateResult | RowFault]]:
    """Each result with its row key, in any order; a RowFault where the model failed.

    `keys` has the row key of each request, by its index.
    """
    for result in engine.generate(requests):
        fault = None if result.error is None else RowFault("model_failed", result.error)
        yield keys[result.index], fault or result


def write_up(
    step: GenerateStep,
    result: GenerateResult,
    prompt_tokens: int,
    tokenizer: Tokenizer,
    *,
    chat: bool = True,
) -> Writing:
    """The answer to one prompt, from the generated ids; cut before the first stop text.

    `prompt_tokens` is the number of the prompt's token ids. Without `chat`, the answer is the text
    that continues the prompt: its blanks and line ends are part of it.
    """
    ids, finish_reason = result.ids, result.finish_reason
    # An incomplete last character is dropped only if the length limit cut it off.
    text = tokenizer.decode(ids, cut=finish_reason == "length", continues=not chat)
    ends = [text.find(stop) for stop in step.stop if stop in text]
    if ends:
        # The one that is first in the text, not in the list.
        text, finish_reason = text[: min(ends)], "stop"
    text = clean_answer(text) if chat else text
    writing = Writing(text, finish_reason, prompt_tokens, len(ids))
    return _with_confidence(step, writing, result.log_probs)


def _with_confidence(step: GenerateStep, writing: Writing, log_probs: Sequence[float]) -> Writing:
    """`writing` with the numbers that the step asks for; without its text if they are too low."""
    if not (step.log_probs or step.tells_confidence):
        return writing
    sure = Confidence.of(log_probs)
    if not step.tells_confidence:
        return replace(writing, log_prob=sure.log_prob)
    text = None if sure.is_below(step.abstain_below) else writing.text
    return replace(writing, text=text, **asdict(sure))
