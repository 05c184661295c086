"""Encode the job's extraction about labelled reviews for training, token by token as in a job.

The engine forces the text between the values of an answer, and the model chooses the rest. So an
answer's ids are not those of its text as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from glmbatch.glm.form import Form, RowForm
from glmbatch.glm.form_tokens import form_tokens
from glmbatch.glm.tokenizer import Tokenizer
from glmbatch.settings.job import ExtractStep
from glmbatch.settings.steps.fields import instructions
from glmbatch.steps.extract import as_json, form_of
from glmbatch.steps.prompt import Prompt, build_prompts
from glmbatch.tuning.encode import TrainingRow


def fact_texts(rows: Sequence[dict[str, Any]], step: ExtractStep) -> Iterator[str]:
    """The texts of all prompts and answers, for the tokenizer."""
    for row in rows:
        yield step.prompt_template.format_map(row)
        yield as_json(row["facts"])
    yield from [instructions(step.fields)] * len(rows)


def encode_facts(
    rows: Sequence[dict[str, Any]], step: ExtractStep, tokenizer: Tokenizer, max_positions: int
) -> list[TrainingRow]:
    """A training row for each of `rows` whose prompt and answer fit into `max_positions`."""
    form = form_of(step, tokenizer)
    room = max_positions - form.longest
    prompts = build_prompts(step, rows, tokenizer, chat=True, max_input_tokens=room)
    encoded = []
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if isinstance(prompt, Prompt):
            answer = answer_ids(form, as_json(row["facts"]))
            ids = np.array(prompt.ids, np.int32)
            encoded.append(TrainingRow(ids, 0, str(place), np.array(answer, np.int32)))
    return encoded


def answer_ids(form: Form, text: str) -> list[int]:
    """The ids of the answer `text` in `form`: those that are forced, and those to choose."""
    tokens = form_tokens(form.tokenizer)
    state = RowForm(form, {}).begin()
    ids = list(state.begin())
    ended = False
    while not ended:
        rest = text.encode()[len(tokens.bytes_of(ids)) :]
        for token in tokens.encode(rest):
            advance = state.advance(token)
            ids += [token, *advance.ids]
            ended = advance.ended
            if advance.ids or ended:
                break
    assert tokens.bytes_of(ids) == text.encode(), "an answer is longer than max_tokens"
    return ids
