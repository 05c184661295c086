"""Where the steps of a job get their values: columns of the source, and earlier answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from glmbatch.errors import InputError, some_of
from glmbatch.settings.columns import Columns
from glmbatch.settings.conditions import Compares, IsOneOf, Test, parse_condition, tests_of
from glmbatch.settings.job import (
    TEXT,
    AnyStep,
    ClassifyStep,
    JobConfig,
    conditioned_columns,
)
from glmbatch.steps.answers import answers_schema
from glmbatch.steps.prompt import HISTORY
from glmbatch.store.inputs.conditions import check_tests
from glmbatch.store.inputs.needs import NeededColumn, NeededTests, SchemaNeeds


class WhenInputs(BaseModel, frozen=True, extra="forbid"):
    """The text of a step's condition, and where the columns in it get their values.

    `columns` maps them to source columns, `answers` to the earlier steps that write them.
    """

    text: str
    columns: dict[str, str]
    answers: dict[str, str]


class PromptInputs(BaseModel, frozen=True, extra="forbid"):
    """Where the placeholders of one prompt template get their values.

    `columns` maps placeholders to source columns. `earlier` names the steps whose answers the
    prompt or the condition uses. `texts` are the placeholders that stand for the text column: they
    must not be blank, and they are cut when a prompt is too long. `when` is the condition, if any.

    `history` is the column of earlier turns, if any. `questions` are the placeholders of that
    column, which stand for the last question of its turns.

    `fields` maps placeholders to the earlier steps that write these columns beside their answer.
    `by_failures`: a condition, its own or that of an earlier step, tests why a row has no answer.
    """

    columns: dict[str, str]
    earlier: tuple[str, ...]
    texts: tuple[str, ...]
    when: WhenInputs | None = None
    history: str | None = None
    questions: tuple[str, ...] = ()
    fields: dict[str, str] = {}
    by_failures: bool = False

    @property
    def sources(self) -> dict[str, str]:
        """The source columns that the prompt uses, by placeholder; that of the turns by HISTORY."""
        return self.columns if self.history is None else {**self.columns, HISTORY: self.history}


def prompt_inputs(job: JobConfig) -> dict[str, PromptInputs]:
    """Where each step's placeholders get their values, by step name.

    The only place that knows the rule of the text column: both {text} and the column's own name
    stand for it.
    """
    inputs: dict[str, PromptInputs] = {}
    for step in job.steps:
        columns = job.source_columns(step)
        texts = [name for name, column in columns.items() if column == job.data.text_column]
        questions = [name for name, column in columns.items() if column == step.history_column]
        when = _when_inputs(step, job.steps_before(step), job.data.text_column)
        answers = job.earlier_columns(step)
        used = {*answers.values(), *(when.answers.values() if when else ())}
        earlier = [other.name for other in job.steps_before(step) if other.name in used]
        inputs[step.name] = PromptInputs(
            columns={name: columns[name] for name in columns if name not in questions},
            earlier=tuple(earlier),
            texts=tuple(dict.fromkeys([*texts, *questions])),
            when=when,
            history=step.history_column,
            questions=tuple(questions),
            fields={name: writer for name, writer in answers.items() if name != writer},
            by_failures=_tests_failures(when) or any(inputs[name].by_failures for name in earlier),
        )
    return inputs


def _when_inputs(step: AnyStep, before: Sequence[AnyStep], text_column: str) -> WhenInputs | None:
    if step.when is None:
        return None
    writers: dict[str, str] = {}
    for earlier in before:
        writers.update(dict.fromkeys(earlier.answer_columns, earlier.name))
    columns: dict[str, str] = {}
    answers: dict[str, str] = {}
    for name in conditioned_columns(step):
        if name in writers:
            answers[name] = writers[name]
        else:
            columns[name] = text_column if name == TEXT else name
    return WhenInputs(text=step.when, columns=columns, answers=answers)


def _tests_failures(when: WhenInputs | None) -> bool:
    answers = {} if when is None else when.answers
    return any(column in Columns(step).reasons for column, step in answers.items())


def schema_needs(job: JobConfig, inputs: Mapping[str, PromptInputs]) -> SchemaNeeds:
    """The columns that the job reads from each file, and those that it writes."""
    read: list[NeededColumn] = []
    written: dict[str, str] = {}
    tests: list[NeededTests] = []
    for index, step in enumerate(job.steps):
        written.update(dict.fromkeys(job.written_columns(step), step.name))
        for name, column in inputs[step.name].columns.items():
            is_text = name in inputs[step.name].texts
            setting = "data.text_column" if is_text else f"steps[{index}].prompt_template"
            read.append(NeededColumn(column, setting, is_text))
        history = inputs[step.name].history
        if history is not None:
            setting = f"steps[{index}].history_column"
            read.append(NeededColumn(history, setting, is_text=False, is_history=True))
        when = inputs[step.name].when
        if when is not None:
            setting = f"steps[{index}].when"
            for column in when.columns.values():
                read.append(NeededColumn(column, setting, is_text=False, is_tested=True))
            tests.append(NeededTests(setting, when.text, when.columns))
    if job.data.id_column is not None:
        read.append(NeededColumn(job.data.id_column, "data.id_column", False))
    return SchemaNeeds(tuple(read), written, tuple(tests))


def check_conditions(
    steps: Sequence[AnyStep],
    inputs: Mapping[str, PromptInputs],
    head_labels: Mapping[str, Sequence[str]],
) -> None:
    """InputError when a condition tests an earlier answer for what it can never be.

    `head_labels` are those of the trained head that answers a step, by the step's name.
    """
    by_name = {step.name: step for step in steps}
    for index, step in enumerate(steps):
        when = inputs[step.name].when
        if when is None:
            continue
        condition = parse_condition(when.text)
        kinds = {}
        for column, name in when.answers.items():
            kinds[column] = answers_schema(by_name[name], head_labels[name]).field(column).type
        where = (f"step {step.name!r}", f"steps[{index}].when")
        check_tests(condition, kinds, where)
        for test in tests_of(condition):
            earlier = by_name.get(test.column)
            if test.column not in when.answers or not isinstance(earlier, ClassifyStep):
                continue
            if not earlier.number:
                labels = earlier.labels or head_labels[earlier.name]
                _check_labels(test, labels, where)


def _check_labels(test: Test, labels: Sequence[str], where: tuple[str, str]) -> None:
    values: Sequence[object] = ()
    if isinstance(test, IsOneOf):
        values = test.values
    elif isinstance(test, Compares) and test.sign in ("==", "!="):
        values = (test.value,)
    for value in values:
        if value not in labels:
            raise InputError(
                f"{where[0]}: step {test.column!r} never answers {value!r}; its labels are "
                f"{some_of(labels, str(value))}. Set {where[1]}."
            )
