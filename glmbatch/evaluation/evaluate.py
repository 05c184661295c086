"""Read this first: a job over labelled rows, and how often its answers are right.

labelled rows -> the very job, as `annotate_table` runs it -> answers -> numbers of each step

Publishes nothing. The answers are kept by their keys, so that the model is not asked twice.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from glmbatch.errors import GlmbatchError, InputError, some_of
from glmbatch.evaluation.bootstrap import groups_of
from glmbatch.evaluation.checkpoint import learned_rows
from glmbatch.evaluation.confidence.calibrate import write_calibration
from glmbatch.evaluation.results import Evaluation
from glmbatch.evaluation.steps import Answered, score_step
from glmbatch.evaluation.truth import (
    FLAG,
    Truth,
    allowed_truths,
    check_labels,
    check_names,
    columns_to_read,
    read_labelled_rows,
    truth_of,
)
from glmbatch.run.prompts import inputs_of
from glmbatch.run.table import Job, answers_to, settings_of
from glmbatch.run.work import confidence_keys
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import JobConfig
from glmbatch.steps.inputs import schema_needs
from glmbatch.store.files import check_file
from glmbatch.store.frames import WHERE, as_frame
from glmbatch.store.parquet import check_column
from glmbatch.store.types import take_rows

logger = logging.getLogger(__name__)

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
    "data.where": None,
    "data.columns": None,
    "data.id_column": None,
    "canary": None,
    "evaluate": None,
    "calibration": None,  # it is measured, or fitted again, on the model's own confidence
    "on_error": "null",
    "max_error_rate": 1.0,
}


def evaluate(  # noqa: PLR0913 - the options of the command
    job: Job,
    rows: str,
    *,
    truth: Mapping[str, str] | None = None,
    keep: str | os.PathLike[str] | None = None,
    precisions: Sequence[float] = PRECISIONS,
    calibrate: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """The numbers of every step of `job` over the labelled `rows`: a Parquet file, folder or glob.

    `truth` maps steps, and fields as `step.field`, to columns; a step without an entry takes the
    column of its own name. `keep` is the folder for the answers. `calibrate` is the file for the
    calibration of all steps. InputError if no step has a truth, and as for `annotate_table`.
    """
    if calibrate is not None:
        check_file("--calibrate", os.path.expanduser(calibrate))
    began = time.monotonic()
    settings = measured_settings(job)
    steps, given = settings.steps, truth or {}
    table, every, truths = _read(settings, rows, given)
    if not any(truths.values()):
        raise InputError(
            f"{rows}: no column has the truth of a step; it has {some_of(every)}. "
            f"Name one for each step, such as {FLAG} {steps[0].name}=COLUMN."
        )
    names, known_R = known_by_step(rows, truths)
    asked = narrowed(settings, names, rows, every)
    folder = keep or own_folder(settings.runtime.cache)
    known = take_rows(table, np.flatnonzero(known_R))
    answered = ask_about(known, asked, rows, folder).spread(known_R)
    fits = calibrate is not None
    found = []
    for step in asked.steps:
        found.append(score_step(step, truths[step.name], answered, precisions, calibrate=fits))
    if calibrate is not None:
        write_calibration(calibrate, found, answered.keys)
    return Evaluation(
        rows=len(table),
        steps=tuple(found),
        left_out=tuple(step.name for step in steps if step not in asked.steps),
        kept=str(folder),
        calibrated=None if calibrate is None else os.fspath(calibrate),
        seconds=time.monotonic() - began,
    )


def known_by_step(rows: str, truths: Mapping[str, Truth | None]) -> tuple[list[str], np.ndarray]:
    """The steps that have a truth in some rows, and the rows that have one of any step.

    InputError if there are none.
    """
    known = {name: truth.known_rows for name, truth in truths.items() if truth is not None}
    known_R = np.any(list(known.values()), axis=0)
    if not known_R.any():
        columns: list[str] = []
        for truth in truths.values():
            columns += () if truth is None else truth.columns.values()
        raise InputError(
            f"{rows}: no row has a truth: column {some_of([*dict.fromkeys(columns)])} is null in "
            f"all. Label some rows, or name another column with {FLAG}."
        )
    return [name for name, known_rows in known.items() if any(known_rows)], known_R


def narrowed(job: Job, names: Collection[str], rows: str, every: Sequence[str]) -> JobConfig:
    """`job` with the steps `names` alone, and the earlier ones whose answers they use.

    InputError if `rows`, whose columns are `every`, lack one that these read.
    """
    settings = settings_of(job, {})
    inputs = inputs_of(settings)
    needed = {*names}
    for step in reversed(settings.steps):
        if step.name in needed:
            needed.update(inputs[step.name].earlier)
    steps = [step for step in settings.steps if step.name in needed]
    found = settings.model_copy(update={"steps": steps})
    # Here, and not by the run, which is given no other columns and could not name them.
    schema = pa.schema([(name, pa.null()) for name in every])
    for column in schema_needs(found, inputs).read:
        if column.name not in every:
            check_column(
                rows, schema, column.name, column.setting, text=False, advice=column.advice
            )
    return found


def _read(
    job: Job, rows: str, given: Mapping[str, str]
) -> tuple[pa.Table, list[str], dict[str, Truth | None]]:
    """The labelled rows, the names of all their columns, and the truth of each step, if any."""
    settings = settings_of(job, {})
    steps = settings.steps
    check_names(steps, given)
    wanted, places = columns_of(settings, given)
    table, names = read_labelled_rows(rows, wanted)
    truths = {step.name: truth_of(step, table, places[step.name], given) for step in steps}
    for step in steps:  # the labels of a trained head are known only later
        check_labels(step, allowed_truths(step), truths[step.name])
    return table, names, truths


def measured_settings(job: Job) -> JobConfig:
    """The settings of `job` without what protects a publication."""
    settings = settings_of(job, SETTINGS)
    steps = [step.model_copy(update={"audits": type(step.audits)()}) for step in settings.steps]
    return settings.model_copy(update={"steps": steps})


def columns_of(
    job: Job, given: Mapping[str, str]
) -> tuple[set[str], dict[str, dict[str, list[str]]]]:
    """As `columns_to_read`, of a job."""
    settings = settings_of(job, {})
    needs = schema_needs(settings, inputs_of(settings))
    read = {column.name for column in needs.read}
    return columns_to_read(settings.steps, given, read, settings.data.text_column)


def own_folder(cache: str) -> str:
    """The folder for the answers of evaluations in the folder `cache`; it is created."""
    folder = os.path.join(os.path.expanduser(cache), FOLDER)
    os.makedirs(folder, mode=0o700, exist_ok=True)  # it has texts of the rows
    return folder


def ask_about(table: pa.Table, job: Job, name: str, folder: str | os.PathLike[str]) -> Answered:
    """The answers to all rows of `table`, which come from `name`."""
    settings = settings_of(job, {})
    # A truth has the name of the answer that it is compared with.
    written: set[str] = set()
    for step in settings.steps:
        written.update(map(str.casefold, step.answer_columns))
    asked = [column for column in table.column_names if column.casefold() not in written]
    try:
        found = answers_to(as_frame(table.select(asked)), settings, folder)
    except GlmbatchError as error:
        raise type(error)(str(error).replace(WHERE, name)) from error
    for note in found.summary.notes:
        logger.warning("%s", note)
    text = settings.data.text_column
    if text in table.column_names:
        texts = table.column(text).to_pylist()
    else:  # prompts of other columns: equal prompts are equal rows
        texts = found.answers.column(Columns(settings.steps[0].name).key).to_pylist()
    asked_of = {step.name: step for step in found.summary.steps}
    step_keys = {question.name: question.key for question in found.questions}
    keys = confidence_keys(found.questions)
    learned_R = {each.name: learned_rows(each, table) for each in found.questions}
    return Answered(found.answers, groups_of(texts), asked_of, step_keys, keys, learned_R)
