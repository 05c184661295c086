"""Where the steps of a job get their values: columns of the source, and earlier answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel

from glmbatch.errors import InputError, some_of
from glmbatch.settings.columns import NO_ERRORS, Columns
from glmbatch.settings.conditions import (
    Compares,
    Has,
    IsOneOf,
    Test,
    Value,
    parse_condition,
    tests_of,
)
from glmbatch.settings.job import (
    TEXT,
    AnyStep,
    ClassifyStep,
    ExtractStep,
    JobConfig,
    conditioned_columns,
)
from glmbatch.steps.answers import answers_schema
from glmbatch.steps.prompt import HISTORY, FaultKind
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
            advice = "" if is_text else _near_answers(name, job.steps_before(step))
            read.append(NeededColumn(column, setting, is_text, advice=advice))
        history = inputs[step.name].history
        if history is not None:
            setting = f"steps[{index}].history_column"
            read.append(NeededColumn(history, setting, is_text=False, is_history=True))
        when = inputs[step.name].when
        if when is not None:
            setting = f"steps[{index}].when"
            for name, column in when.columns.items():
                advice = "" if name == TEXT else _near_answers(name, job.steps_before(step))
                read.append(NeededColumn(column, setting, False, is_tested=True, advice=advice))
            tests.append(NeededTests(setting, when.text, when.columns))
    if job.data.id_column is not None:
        read.append(NeededColumn(job.data.id_column, "data.id_column", False))
    for name in job.data.columns or ():
        read.append(NeededColumn(name, "data.columns", False, is_tested=True))
    return SchemaNeeds(tuple(read), written, tuple(tests), job.data.columns_out or None)


def _near_answers(name: str, before: Sequence[AnyStep]) -> str:
    """The end of a sentence about the missing column `name`: the earlier answers it may mean."""
    columns: list[str] = []
    for step in before:
        columns += step.answer_columns
        if name in (*Columns(step.name).reasons, Columns(step.name).key):
            return f"; no prompt may use errors or keys of step {step.name!r}"
    near = get_close_matches(name, columns, 1, cutoff=0.8)
    if near:
        return f"; did you mean {near[0]}?"
    for step in before:
        if name.startswith(f"{step.name}_"):
            return f"; step {step.name!r} answers {some_of(step.answer_columns, name)}"
    return ""


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
            if test.column in when.answers:
                earlier = by_name[when.answers[test.column]]
                known = _known_values(earlier, head_labels[earlier.name])
                if test.column in known:
                    _check_values(test, earlier.name, known[test.column], where)


@dataclass(frozen=True, slots=True)
class _Known:
    """The texts that a column may have, or the bounds of its numbers, and the word for them."""

    what: str
    texts: Sequence[str] | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)


def _known_values(step: AnyStep, head_labels: Sequence[str]) -> dict[str, _Known]:
    """What the answer columns of `step` may have, by their names, where that is limited."""
    columns = Columns(step.name)
    known = {columns.error_type: _Known("error types", (*get_args(FaultKind), *NO_ERRORS))}
    if isinstance(step, ClassifyStep):
        if not step.number:
            known[columns.answer] = _Known("labels", step.labels or head_labels)
        return known
    known[columns.finish_reason] = _Known("finish reasons", ("stop", "length"))
    if isinstance(step, ExtractStep):
        known[columns.abstained] = _Known("fields", [field.name for field in step.fields])
        for field in step.fields:
            value = field.items or field
            if value.type == "choice":
                known[columns.field(field.name).answer] = _Known("choices", value.choices)
            elif value.type in ("integer", "number"):
                known[columns.field(field.name).answer] = _Known("bounds", bounds=value.bounds)
    return known


def _check_values(test: Test, step: str, known: _Known, where: tuple[str, str]) -> None:
    values: Sequence[Value] = ()
    sign = "=="
    if isinstance(test, IsOneOf):
        values = test.values
    elif isinstance(test, Compares | Has):
        values = (test.value,)
        sign = test.sign if isinstance(test, Compares) else sign
    place = "" if test.column == step else f" in {test.column}"
    for value in values:
        if known.texts is not None:
            may_be = value in known.texts or sign not in ("==", "!=")
            seen, range_text = f"{value!r}", some_of(known.texts, str(value))
        else:
            least, greatest = known.bounds
            assert isinstance(value, int | float)
            may_be = _within(sign, value, known.bounds)
            seen = str(value) if sign == "==" else f"{sign} {value}"
            range_text = f"{least} and {greatest}"
        if not may_be:
            raise InputError(
                f"{where[0]}: step {step!r} never answers {seen}{place}; its {known.what} are "
                f"{range_text}. Set {where[1]}."
            )


def _within(sign: str, value: float, bounds: tuple[float, float]) -> bool:
    """Whether a number within `bounds` may compare as `sign` with `value`."""
    least, greatest = bounds
    if sign in ("<", "<="):
        return least < value or (sign == "<=" and least == value)
    if sign in (">", ">="):
        return greatest > value or (sign == ">=" and greatest == value)
    return least <= value <= greatest
