"""Decide which rows the model must be asked about: for a run and for `glmbatch plan`.

Knows no engine and no source files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.ledger.known.answers import KnownAnswers
from glmbatch.ledger.rowkeys import row_key
from glmbatch.run.models import tokenizer_of
from glmbatch.run.work import Question
from glmbatch.settings.columns import Columns
from glmbatch.steps.prompt import Prompt, RowFault, RowValues, build_prompts


def build_question_prompts(
    question: Question, rows: Sequence[RowValues]
) -> list[Prompt | RowFault]:
    """The prompt of each row, or the fault that prevents one, in the order of `rows`."""
    return build_prompts(
        question.step,
        rows,
        tokenizer_of(question.model),
        chat=question.chat,
        max_input_tokens=question.max_prompt_tokens,
        texts=question.inputs.texts,
    )


def key_prompts(
    question: Question, prompts: Sequence[Prompt | RowFault | None]
) -> tuple[list[bytes | None], dict[bytes, Prompt]]:
    """The row key of each prompt in order, None for a row without one; and the prompts by row key.

    Rows with the same text share a key, so the second value holds each distinct prompt once.
    """
    keys: list[bytes | None] = []
    distinct: dict[bytes, Prompt] = {}
    for prompt in prompts:
        key = None  # a fault, or a row that waits for an earlier step's answer
        if isinstance(prompt, Prompt):
            # From the rendered text, so rows with the same prompt share one answer in any file.
            key = row_key(question.key, prompt.text)
            distinct[key] = prompt
        keys.append(key)
    return keys, distinct


@dataclass(frozen=True, slots=True)
class Triage:
    """Distinct prompts of one question, sorted into known and to be asked.

    `known` has one row for each answer found, in any order. `to_ask` maps all other row keys to
    their prompts. `failed` are the keys in `to_ask` on which the model failed before.
    """

    known: pa.Table
    to_ask: dict[bytes, Prompt]
    failed: frozenset[bytes]


def triage(question: Question, distinct: Mapping[bytes, Prompt], known: KnownAnswers) -> Triage:
    """Look up `distinct` prompts in the index `known`, and sort them into known and to be asked."""
    columns = Columns(question.name)
    answers = known.find(distinct)
    failures = answers.column(columns.error).is_valid()
    failed = answers.filter(failures).column(columns.key).to_pylist()
    # Only `glmbatch plan` indexes failures; for a run, rows that failed are like new ones.
    answers = answers.filter(pc.invert(failures))
    # The index compares half a key, so the answers found are compared by the whole key.
    answered = set(answers.column(columns.key).to_pylist())
    to_ask = {key: prompt for key, prompt in distinct.items() if key not in answered}
    return Triage(answers, to_ask, frozenset(failed))
