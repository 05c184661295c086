"""From rows to prompts, and which prompts the model must be asked: for a run and for `plan`.

Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import UnusableFile
from glmbatch.glm.files import recorded_prompt
from glmbatch.ledger.fragments import Fragment, read_fragment
from glmbatch.ledger.known.answers import KnownAnswers
from glmbatch.ledger.rowkeys import row_key
from glmbatch.run.checks.steps import with_trained
from glmbatch.run.models import encoder_of
from glmbatch.run.work import Question
from glmbatch.settings.columns import Columns
from glmbatch.settings.conditions import parse_condition
from glmbatch.settings.job import AnyStep, ClassifyStep, JobConfig, placeholders
from glmbatch.steps.answers import answers_schema, kind_of
from glmbatch.steps.extract import as_json
from glmbatch.steps.history import read_histories
from glmbatch.steps.inputs import PromptInputs, WhenInputs, prompt_inputs
from glmbatch.steps.prompt import (
    HISTORY,
    History,
    NoPrompt,
    NotAsked,
    Prompt,
    PromptValue,
    RowFault,
    RowValues,
    build_prompts,
)
from glmbatch.store.inputs.conditions import rows_where
from glmbatch.store.lines.form import LINE_ERROR
from glmbatch.store.values import is_plain, prompt_values, turn_values

# The column of `source_table` that says why a line cannot be read. No file has such a name.
UNREADABLE = "[unreadable]"


@dataclass(frozen=True, slots=True)
class Earlier:
    """The answers of an earlier step in row order: what a prompt takes, and the whole table.

    Of `values`, None is an answer that does not exist yet; the table is null there.
    """

    values: Sequence[str | NoPrompt | None]
    table: pa.Table


def inputs_of(job: JobConfig) -> dict[str, PromptInputs]:
    """Where each step's placeholders get their values, as `prompt_inputs`.

    A step without a prompt takes that of its head's training, with the columns that it shows. Only
    from checkpoints on this machine: the columns are needed before any checkpoint is fetched.
    """
    steps: list[AnyStep] = []
    for step in job.steps:
        model = job.model_of(step)
        trained = recorded_prompt(model.path, model.adapter)
        if isinstance(step, ClassifyStep) and trained is not None and not trained.get("writes"):
            steps.append(with_trained(step, trained))
        else:
            steps.append(step)
    return prompt_inputs(job.model_copy(update={"steps": steps}))


def read_prompt_rows(
    fragment: Fragment,
    question: Question,
    earlier: Callable[[str], pa.Table | None],
    *,
    whole: bool = False,
) -> list[RowValues | NoPrompt]:
    """The placeholder values of each row of a fragment in order, or why it has no prompt.

    Reads only the columns that the question uses; with `whole` it decodes the others too. `earlier`
    gives the answers of an earlier step, None if that could not read the fragment. If an
    earlier step failed on a row, a RowFault takes the value's place. UnusableFile when the fragment
    cannot be read.
    """
    source = source_table(fragment, question, whole=whole)
    answers: dict[str, Earlier] = {}
    for name in question.inputs.earlier:
        table = earlier(name)
        if table is None:
            raise UnusableFile(f"{fragment.path}: step {name!r} could not read it")
        answers[name] = Earlier(earlier_values(table, name), table)
    rows = prompt_rows(question, source, answers)
    return [row for row in rows if row is not None]  # no row waits: each earlier step is done


def source_table(fragment: Fragment, question: Question, *, whole: bool = False) -> pa.Table:
    """The source columns that the prompt and the condition use, in row order.

    With `whole`, all columns are decoded. UnusableFile when the fragment cannot be read.
    """
    when = question.inputs.when
    # Several placeholders may stand for one column, which is read once.
    names = {*question.inputs.sources.values(), *(when.columns.values() if when else ())}
    if fragment.reading:
        names.add(LINE_ERROR)
    batches = []
    if names or whole:
        batches = list(read_fragment(fragment, sorted(names), whole=whole))
    if batches and names:
        table = pa.Table.from_batches(batches)
        if fragment.reading:
            table = table.append_column(UNREADABLE, table.column(LINE_ERROR))
        return table
    # As long as the fragment, because a table without columns has no length.
    return pa.table({name: pa.nulls(fragment.rows) for name in names or {"no column"}})


def prompt_rows(
    question: Question, source: pa.Table, earlier: Mapping[str, Earlier]
) -> list[RowValues | NoPrompt | None]:
    """The placeholder values of each row, or why it has no prompt; None if it waits for an answer.

    `source` and `earlier` have what the question uses.
    """
    values = source_values(question.inputs, source)
    used = [name for name in placeholders(question.step.prompt_template) if name in earlier]
    values.update({name: earlier[name].values for name in used})
    for name, step in question.inputs.fields.items():
        values[name] = field_values(earlier[step], name)
        used.append(name)
    rows: list[RowValues | NoPrompt | None] = []
    asked = _asked(question.inputs.when, source, earlier)
    faults = _unreadable(source)
    for place, (row, is_asked) in enumerate(zip(rows_of(values, len(source)), asked, strict=True)):
        if place in faults:
            rows.append(faults[place])
            continue
        if isinstance(is_asked, NoPrompt):
            rows.append(is_asked)
            continue
        # None in a source column is a null, which is a fault of the row.
        waits = is_asked is None or any(row[name] is None for name in used)
        rows.append(None if waits else row)
    return rows


def _unreadable(source: pa.Table) -> dict[int, RowFault]:
    """The rows of lines that cannot be read, by their place in `source`."""
    faults = {}
    if UNREADABLE in source.column_names:
        errors = source.column(UNREADABLE)
        for place in pc.indices_nonzero(errors.is_valid()).to_pylist():
            faults[place] = RowFault("unreadable_line", errors[place].as_py())
    return faults


def source_values(inputs: PromptInputs, source: pa.Table) -> dict[str, Sequence[PromptValue]]:
    """What prompts take from the columns of `source`, in row order: see `RowValues`."""
    values: dict[str, Sequence[PromptValue]] = {}
    for name, column in inputs.columns.items():
        values[name] = prompt_values(source.column(column))
    if inputs.history is not None:
        turns = turn_values(source.column(inputs.history))
        histories = read_histories(inputs.history, turns, ends_open=bool(inputs.questions))
        values[HISTORY] = histories
        last = [turn.question if isinstance(turn, History) else turn for turn in histories]
        values |= dict.fromkeys(inputs.questions, last)
    return values


def _asked(
    when: WhenInputs | None, source: pa.Table, earlier: Mapping[str, Earlier]
) -> Sequence[Literal[True] | NoPrompt | None]:
    """Whether each row is asked: True, or why it is not; None if that waits for an answer."""
    if when is None:
        return [True] * len(source)
    columns = {name: source.column(column) for name, column in when.columns.items()}
    unknown = {}
    failing: list[str] = []  # the steps without whose answer the condition may be open
    for name, step in when.answers.items():
        values = earlier[step].values
        columns[name] = earlier[step].table.column(name)
        # Known are the null of a row that was not asked, and the reason of a failure.
        is_open = [value is None for value in values]
        if name not in Columns(step).reasons:
            failing.append(step)
            is_open = [value is None or isinstance(value, RowFault) for value in values]
        unknown[name] = pa.chunked_array([pa.array(is_open, pa.bool_())])
    asked: list[Literal[True] | NoPrompt | None] = []
    for row, holds in enumerate(rows_where(parse_condition(when.text), columns, unknown)):
        if holds is not None:
            asked.append(True if holds else NotAsked())
            continue
        if any(earlier[step].values[row] is None for step in when.answers.values()):
            asked.append(None)
            continue
        deciding = [earlier[step].values[row] for step in failing]
        asked.append(next(value for value in deciding if isinstance(value, RowFault)))
    return asked


def rows_of(values: Mapping[str, Sequence[PromptValue]], length: int) -> list[RowValues]:
    """The rows of columns of `length` values, in order, each with the columns' names as keys."""
    rows: list[RowValues] = []
    for row in range(length):
        rows.append({name: column[row] for name, column in values.items()})
    return rows


def earlier_values(table: pa.Table, step: str) -> list[str | NoPrompt]:
    """The values that a later prompt takes from the answers of `step`, in row order.

    A row on which `step` failed has a RowFault instead, and one that it has no answer for without
    a failure is not asked about.
    """
    values: list[str | NoPrompt] = []
    faults = table.column(Columns(step).error).to_pylist()
    for value, fault in zip(table.column(step).to_pylist(), faults, strict=True):
        if fault is not None:
            values.append(RowFault("earlier_step_failed", f"{step} failed: {fault}"))
        elif value is None:
            values.append(NotAsked())
        else:
            values.append(as_text(value))
    return values


def field_values(earlier: Earlier, column: str) -> list[str | bytes | NoPrompt | None]:
    """The values that a later prompt takes from a `column` beside the answer, in row order.

    After a failure, and before there is an answer, they are as those of the answer. A row is not
    asked about a null in one; a row from whose answer the model abstained has its other values.
    """
    values: list[str | bytes | NoPrompt | None] = []
    texts = column_texts(earlier.table.column(column))
    for answer, text in zip(earlier.values, texts, strict=True):
        if answer is None or isinstance(answer, RowFault):
            values.append(answer)
        else:
            values.append(NotAsked() if text is None else text)
    return values


def column_texts(column: pa.ChunkedArray) -> list[str | bytes | None]:
    """The values of a column of answers as later prompts show them; None for null."""
    if is_plain(column.type) and not pa.types.is_boolean(column.type):
        return prompt_values(column)
    return [None if value is None else as_text(value) for value in column.to_pylist()]


def with_reasons(
    answers: pa.Table, step: str, prompts: Sequence[Prompt | NoPrompt | None]
) -> pa.Table:
    """`answers` of `step`, with the reasons why rows without a prompt have none, as a run has."""
    faults = [prompt.reason if isinstance(prompt, RowFault) else None for prompt in prompts]
    kinds = [kind_of(prompt) if isinstance(prompt, NoPrompt) else None for prompt in prompts]
    for name, reasons in zip(Columns(step).reasons, (faults, kinds), strict=True):
        column = pc.coalesce(answers.column(name), pa.array(reasons, pa.string()))
        answers = answers.set_column(answers.column_names.index(name), name, column)
    return answers


def as_text(answer: Any) -> str:
    """An answer as a later prompt shows it: a text as it is, several values with commas.

    Booleans are true and false, as in the JSON of all fields.
    """
    if isinstance(answer, list):
        return ", ".join(as_text(item) if isinstance(item, bool) else str(item) for item in answer)
    return answer if isinstance(answer, str) else as_json(answer)


def build_question_prompts(
    question: Question, rows: Sequence[RowValues | NoPrompt]
) -> list[Prompt | NoPrompt]:
    """The prompt of each row, or why it has none, in the order of `rows`."""
    return build_prompts(
        question.step,
        rows,
        encoder_of(question.model),
        chat=question.chat,
        max_input_tokens=question.max_prompt_tokens,
        texts=question.inputs.texts,
    )


def prompt_notes(questions: Sequence[Question]) -> tuple[str, ...]:
    """A note on each question that asks all rows the same, which is rarely meant."""
    notes = []
    for question in questions:
        if not placeholders(question.step.prompt_template) and question.inputs.history is None:
            notes.append(
                f"step {question.name!r} asks all rows the same: its prompt_template has no "
                "placeholder such as {text}"
            )
    return tuple(notes)


def key_prompts(
    question: Question, prompts: Sequence[Prompt | NoPrompt | None]
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
    schema = answers_schema(question.step, question.model.labels)
    # The index may name its columns after another step with the same question.
    answers = known.find(distinct).rename_columns(schema.names).cast(schema)
    failures = answers.column(columns.error).is_valid()
    failed = answers.filter(failures).column(columns.key).to_pylist()
    # Only `glmbatch plan` indexes failures; for a run, rows that failed are like new ones.
    answers = answers.filter(pc.invert(failures))
    # The index compares half a key, so the answers found are compared by the whole key.
    answered = set(answers.column(columns.key).to_pylist())
    to_ask = {key: prompt for key, prompt in distinct.items() if key not in answered}
    return Triage(answers, to_ask, frozenset(failed))
