"""A generate step: the text, why it ended, what it cost. Token ids in, columns out; no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import pyarrow as pa

from glmbatch.glm.engine.protocol import Engine, GenerateRequest
from glmbatch.glm.tokenizer import Tokenizer, clean_answer
from glmbatch.ledger.rowkeys import row_seed
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import GenerateStep
from glmbatch.steps.prompt import Prompt, RowFault


@dataclass(frozen=True, slots=True)
class Writing:
    """What the model wrote for one row."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def writing_fields(step: GenerateStep) -> list[pa.Field]:
    """Fields of the answer; fixed by the settings, never by the answers."""
    columns = Columns(step.name)
    return [
        pa.field(columns.answer, pa.string()),
        pa.field(columns.finish_reason, pa.string()),
        pa.field(columns.prompt_tokens, pa.int32()),
        pa.field(columns.completion_tokens, pa.int32()),
    ]


def writing_columns(writings: Sequence[Writing | None]) -> list[list[object]]:
    """Values of `writing_fields`, null where nothing was written."""
    columns: list[list[object]] = [[], [], [], []]
    for writing in writings:
        values = (None, None, None, None) if writing is None else astuple(writing)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return columns


def ask_writings(
    step: GenerateStep, prompts: Mapping[bytes, Prompt], engine: Engine, tokenizer: Tokenizer
) -> Iterator[tuple[bytes, Writing | RowFault]]:
    """Ask the engine to continue each prompt; yield keys and answers as they end, in any order."""
    keys = list(prompts)  # the engine knows requests by number
    should_stop = stop_check(step, tokenizer)
    requests = (
        GenerateRequest(
            index,
            prompts[key].ids,
            step.max_tokens,
            temperature=step.temperature,
            top_p=step.top_p,
            top_k=step.top_k,
            seed=row_seed(step.seed, key),  # a row's draws do not depend on its batch
            should_stop=should_stop,
            shared_tokens=prompts[key].shared_tokens,
        )
        for index, key in enumerate(keys)
    )
    for result in engine.generate(requests):
        key = keys[result.index]
        if result.error is not None:
            yield key, RowFault("model_failed", result.error)
        else:
            yield (
                key,
                write_up(step, result.ids, result.finish_reason, len(prompts[key].ids), tokenizer),
            )


def write_up(
    step: GenerateStep,
    ids: Sequence[int],
    finish_reason: str,
    prompt_tokens: int,
    tokenizer: Tokenizer,
) -> Writing:
    """The answer as text, cut before the first stop text. Its tokens count all that was written."""
    # Only the cut makes a character incomplete; one that the model left so, and went on, stays.
    text = tokenizer.decode(ids, cut=finish_reason == "length")
    ends = [text.find(stop) for stop in step.stop if stop in text]
    if ends:
        # The first in the text, not the first in the list.
        text, finish_reason = text[: min(ends)], "stop"
    return Writing(clean_answer(text), finish_reason, prompt_tokens, len(ids))


def stop_check(step: GenerateStep, tokenizer: Tokenizer) -> Callable[[Sequence[int]], bool] | None:
    """Whether the ids so far end in a stop text; None when the step has none.

    Each token stands for at least one byte, so the tokens that could hold the newest stop text are
    as many as its bytes; four more cover a character whose bytes began before them.
    """
    if not step.stop:
        return None
    window = max(len(stop.encode()) for stop in step.stop) + 4

    def should_stop(ids: Sequence[int]) -> bool:
        tail = tokenizer.decode(list(ids[-window:]))
        return any(stop in tail for stop in step.stop)

    return should_stop
