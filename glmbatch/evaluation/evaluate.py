"""Read this first: a job over labelled rows, and how often its answers are right.

labelled rows -> the very job, as `annotate_table` runs it -> answers -> numbers of each step

Publishes nothing. The answers are kept by their keys, so that the model is not asked twice.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from glmbatch.errors import GlmbatchError, InputError, some_of
from glmbatch.evaluation.bootstrap import Compared, groups_of
from glmbatch.evaluation.fields import same_values, score_field, score_values
from glmbatch.evaluation.labels import score_labels, score_several
from glmbatch.evaluation.results import Counts, Evaluation, Result, StepResult
from glmbatch.evaluation.texts import score_written
from glmbatch.evaluation.truth import (
    FLAG,
    Truth,
    candidates,
    check_names,
    read_labelled_rows,
    truth_of,
)
from glmbatch.report.summary import StepSummary, Summary
from glmbatch.run.table import Job, answers_to, settings_of
from glmbatch.settings.columns import ABSTAINED, NOT_ASKED, Columns
from glmbatch.settings.job import AnyStep, ClassifyStep, ExtractStep
from glmbatch.steps.inputs import prompt_inputs, schema_needs
from glmbatch.store.frames import WHERE, as_frame

# Beside downloaded checkpoints. The answers may be deleted at any time.
FOLDER = "evaluations"
PRECISIONS = (0.95,)
# An evaluation publishes nothing, so nothing holds it up; it looks at all rows.
SETTINGS: Mapping[str, object] = {
    "data.input": WHERE,
    "data.output": WHERE,
    "data.format": "parquet",
    "data.missing_sources": "keep",
    "data.limit": None,
    "data.id_column": None,
    "canary": None,
    "on_error": "null",
    "max_error_rate": 1.0,
}


@dataclass(frozen=True, slots=True)
class Answered:
    """The labelled rows, their answers in the same order, and each row's text as a number."""

    rows: pa.Table
    answers: pa.Table
    group_R: np.ndarray
    summary: Summary


def evaluate(
    job: Job,
    rows: str,
    *,
    truth: Mapping[str, str] | None = None,
    keep: str | os.PathLike[str] | None = None,
    precisions: Sequence[float] = PRECISIONS,
) -> Evaluation:
    """The numbers of every step of `job` over the labelled `rows`: a Parquet file, folder or glob.

    `truth` maps steps, and fields as `step.field`, to columns; a step without an entry takes the
    column of its own name. `keep` is the folder for the answers. InputError if no step has a truth,
    and as for `annotate_table`.
    """
    began = time.monotonic()
    settings = settings_of(job, SETTINGS)
    steps, given = settings.steps, truth or {}
    check_names(steps, given)
    needs = schema_needs(settings, prompt_inputs(settings))
    read = {column.name for column in needs.read}
    places = {step.name: candidates(step, steps, given, read) for step in steps}
    wanted = {*read, settings.data.text_column}
    for choices in places.values():
        wanted.update(*choices.values())
    table, names = read_labelled_rows(rows, wanted)
    truths = {step.name: truth_of(step, table, places[step.name], given) for step in steps}
    if not any(truths.values()):
        raise InputError(
            f"{rows}: no column has the truth of a step; it has {some_of(names)}. "
            f"Name one for each step, such as {FLAG} {steps[0].name}=COLUMN."
        )
    folder = keep or _own_folder(settings.runtime.cache)
    unaudited = [step.model_copy(update={"audits": type(step.audits)()}) for step in steps]
    settings = settings.model_copy(update={"steps": unaudited})
    answered = _ask(table, settings, rows, folder)
    found = [_score_step(step, truths[step.name], answered, precisions) for step in steps]
    return Evaluation(
        rows=len(table), steps=tuple(found), kept=str(folder), seconds=time.monotonic() - began
    )


def _own_folder(cache: str) -> str:
    folder = os.path.join(os.path.expanduser(cache), FOLDER)
    os.makedirs(folder, mode=0o700, exist_ok=True)  # it has texts of the rows
    return folder


def _ask(table: pa.Table, job: Job, name: str, folder: str | os.PathLike[str]) -> Answered:
    """The answers to all rows of `table`, which come from `name`."""
    settings = settings_of(job, {})
    # A truth has the name of the answer that it is compared with.
    written = {column.casefold() for step in settings.steps for column in step.answer_columns}
    asked = [column for column in table.column_names if column.casefold() not in written]
    try:
        answers, summary = answers_to(as_frame(table.select(asked)), settings, folder)
    except GlmbatchError as error:
        raise type(error)(str(error).replace(WHERE, name)) from error
    text = settings.data.text_column
    if text not in table.column_names:  # prompts of other columns: equal prompts are equal rows
        keys = answers.column(Columns(settings.steps[0].name).key).to_pylist()
        return Answered(table, answers, groups_of(keys), summary)
    return Answered(table, answers, groups_of(table.column(text).to_pylist()), summary)


def _score_step(
    step: AnyStep, truth: Truth | None, answered: Answered, precisions: Sequence[float]
) -> StepResult:
    kinds = answered.answers.column(Columns(step.name).error_type).to_pylist()
    known = [False] * len(kinds) if truth is None else truth.known
    scored, counts = _count(kinds, known)
    found = StepResult(
        step=step.name,
        truth={} if truth is None else truth.columns,
        counts=counts,
        results={},
        **_cost(next(each for each in answered.summary.steps if each.name == step.name)),
    )
    if truth is None:
        return found.model_copy(update={"note": "no column has its truth"})
    if not scored:
        return found.model_copy(update={"note": "no row has both a truth and an answer"})
    picked = answered.answers.take(pa.array(scored, pa.int64()))
    group_R = groups_of(answered.group_R[scored].tolist())
    expected = {}
    for name, of_rows in truth.values.items():
        expected[name] = [of_rows[row] for row in scored]
    if isinstance(step, ExtractStep):
        compared = _compared_fields(step, expected, picked, group_R)
        fields = {field.name: field for field in step.fields}
        right_R = np.ones(len(scored), bool)
        results: dict[str, Result] = {}
        for name, values in compared.items():
            results[name] = score_field(fields[name], values, precisions)
            right_R &= same_values(values.truth, values.answers)
        return found.model_copy(update={"results": results, "exact_match": float(right_R.mean())})
    result = _score_answers(step, expected[step.name], picked, precisions, group_R)
    return found.model_copy(update={"results": {step.name: result}})


def _count(kinds: Sequence[str | None], known: Sequence[bool]) -> tuple[list[int], Counts]:
    """The rows to score, and where the others are."""
    scored = []
    others = Counter[str]()
    without = 0
    for row, (kind, is_known) in enumerate(zip(kinds, known, strict=True)):
        if not is_known:
            without += 1
        elif kind is None:
            scored.append(row)
        else:
            others[kind] += 1
    counts = Counts(
        rows=len(kinds),
        scored=len(scored),
        without_truth=without,
        not_asked=others.pop(NOT_ASKED, 0),
        abstained=others.pop(ABSTAINED, 0),
        failed=others,
    )
    return scored, counts


def _cost(summary: StepSummary) -> dict[str, int]:
    return {
        "computed": summary.computed,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
    }


def _score_answers(
    step: AnyStep,
    truth: Sequence[Any],
    answers: pa.Table,
    precisions: Sequence[float],
    group_R: np.ndarray,
) -> Result:
    """The numbers of a step that gives one answer, by the type of its answer column."""
    columns = Columns(step.name)
    column = answers.column(columns.answer)
    values = column.to_pylist()
    if not isinstance(step, ClassifyStep):
        return score_written(truth, values, group_R)
    if pa.types.is_floating(column.type):  # a head that estimates a number
        return score_values([float(value) for value in truth], values, group_R)
    chances = answers.column(columns.scores)
    if step.multiple:
        return score_several(truth, values, chances.to_pylist(), group_R)
    confidence = answers.column(columns.score).to_pylist()
    labels = [field.name for field in chances.type]
    return score_labels(Compared(truth, values, group_R, confidence), labels, precisions)


def _compared_fields(
    step: ExtractStep,
    truth: Mapping[str, Sequence[Any]],
    answers: pa.Table,
    group_R: np.ndarray,
) -> dict[str, Compared]:
    columns = Columns(step.name)
    compared = {}
    for field in step.fields:
        if field.name not in truth:
            continue
        if step.layout == "struct":
            values = [row[field.name] for row in answers.column(columns.answer).to_pylist()]
        else:
            values = answers.column(columns.field(field.name)).to_pylist()
        confidence = None
        if field.type == "choice":
            confidence = answers.column(columns.field_score(field.name)).to_pylist()
        compared[field.name] = Compared(truth[field.name], values, group_R, confidence)
    return compared
