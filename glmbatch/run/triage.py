"""Which rows must be asked and which need not be: for a run and for `glmbatch plan`.

Knows no engine and no files of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.ledger.known import KnownAnswers
from glmbatch.ledger.rowkeys import row_key
from glmbatch.run.models import tokenizer_of
from glmbatch.run.work import Question
from glmbatch.settings.columns import Columns
from glmbatch.steps.prompt import Prompt, RowFault, RowValues, build_prompts


def build_question_prompts(
    question: Question, rows: Sequence[RowValues]
) -> list[Prompt | RowFault]:
    """The prompt of each row, in the order of `rows`, or why it has none."""
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
    """The row key of each prompt (None for a row without one), and the prompts by row key."""
    keys: list[bytes | None] = []
    distinct: dict[bytes, Prompt] = {}
    for prompt in prompts:
        key = None  # a fault, or a prompt that waits for an earlier answer
        if isinstance(prompt, Prompt):
            # By the rendered text: rows that ask the same share one answer, wherever they are.
            key = row_key(question.key, prompt.text)
            distinct[key] = prompt
        keys.append(key)
    return keys, distinct


@dataclass(frozen=True, slots=True)
class Triage:
    """Distinct prompts of one question, sorted by what is to be done about them.

    `known` holds answers found by row key, one row each, in any order. `to_ask` maps the other row
    keys to their prompts; `failed` are those of them on which the model failed before.
    """

    known: pa.Table
    to_ask: dict[bytes, Prompt]
    failed: frozenset[bytes]


def triage(question: Question, distinct: Mapping[bytes, Prompt], known: KnownAnswers) -> Triage:
    """Sort `distinct` prompts by what the index `known` holds for them."""
    columns = Columns(question.name)
    answers = known.find(distinct)
    failures = answers.column(columns.error).is_valid()
    failed = answers.filter(failures).column(columns.key).to_pylist()
    # Only `glmbatch plan` has failures in its index; a run asks about their rows as about new ones.
    answers = answers.filter(pc.invert(failures))
    # Half of a key is looked up in the index; what came back is compared by the whole key.
    answered = set(answers.column(columns.key).to_pylist())
    to_ask = {key: prompt for key, prompt in distinct.items() if key not in answered}
    return Triage(answers, to_ask, frozenset(failed))
