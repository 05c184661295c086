"""From rows to prompts, and which prompts the model must be asked: for a run and for `plan`.

Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import UnusableFile
from glmbatch.ledger.fragments import Fragment, read_fragment
from glmbatch.ledger.known.answers import KnownAnswers
from glmbatch.ledger.rowkeys import row_key
from glmbatch.run.models import tokenizer_of
from glmbatch.run.work import Question
from glmbatch.settings.columns import Columns
from glmbatch.steps.prompt import Prompt, RowFault, RowValues, build_prompts
from glmbatch.store.values import prompt_values


def read_prompt_rows(
    fragment: Fragment,
    question: Question,
    earlier: Callable[[str], pa.Table | None],
    *,
    whole: bool = False,
) -> list[RowValues]:
    """The placeholder values of each row of a fragment in order.

    Reads only the columns that the prompt names; with `whole` it decodes the others too. `earlier`
    gives the answers of an earlier step, None if that could not read the fragment. If an
    earlier step failed on a row, a RowFault takes the value's place. UnusableFile when the fragment
    cannot be read.
    """
    values: dict[str, Sequence[str | bytes | RowFault | None]] = {}
    values.update(source_values(fragment, question.inputs.columns, whole=whole))
    for name in question.inputs.earlier:
        table = earlier(name)
        if table is None:
            raise UnusableFile(f"{fragment.path}: step {name!r} could not read it")
        values[name] = earlier_values(table, name)
    return rows_of(values, fragment.rows)


def rows_of(
    values: Mapping[str, Sequence[str | bytes | RowFault | None]], length: int
) -> list[RowValues]:
    """The rows of columns of `length` values, in order, each with the columns' names as keys."""
    rows: list[RowValues] = []
    for row in range(length):
        rows.append({name: column[row] for name, column in values.items()})
    return rows


def source_values(
    fragment: Fragment, columns: Mapping[str, str], *, whole: bool = False
) -> dict[str, list[str | bytes | None]]:
    """For each placeholder in `columns`, the values of its source column in row order.

    With `whole`, all columns are decoded. UnusableFile when the fragment cannot be read.
    """
    if not columns and not whole:
        return {}
    # Several placeholders may stand for one column, which is read once.
    batches = list(read_fragment(fragment, sorted(set(columns.values())), whole=whole))
    if not batches:
        return {name: [] for name in columns}
    table = pa.Table.from_batches(batches)
    return {name: prompt_values(table.column(column)) for name, column in columns.items()}


def earlier_values(table: pa.Table, step: str) -> list[str | RowFault]:
    """The values that a later prompt takes from the answers of `step`, in row order.

    A row on which `step` failed has a RowFault instead.
    """
    values: list[str | RowFault] = []
    faults = table.column(Columns(step).error).to_pylist()
    for value, fault in zip(table.column(step).to_pylist(), faults, strict=True):
        if fault is None:
            values.append(value)
        else:
            values.append(RowFault("earlier_step_failed", f"{step} failed: {fault}"))
    return values


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
