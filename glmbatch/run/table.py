"""Run a job over a table in memory: the answers of a file run, beside the caller's own columns.

The columns that the prompts name are written to a folder. An ordinary file run answers them there,
and its answers are read back. All other columns stay in memory. Knows no prompts, no models and no
table libraries.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import AuditError, GlmbatchError, InputError, TransientError
from glmbatch.ledger.known.keys import AnswerFile, keys_of, read_keys
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.ledger.receipts import (
    AnswersReceipt,
    BundleReceipt,
    OutputReceipt,
    read_receipt,
)
from glmbatch.report.display import showing_bar
from glmbatch.report.summary import Summary
from glmbatch.run.job import run_job
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import resolve_questions
from glmbatch.run.prompts import inputs_of
from glmbatch.run.session import newest_progress
from glmbatch.run.work import Question
from glmbatch.settings.data import plain
from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import load_job, parse_settings
from glmbatch.settings.steps.any_step import calibrated_columns
from glmbatch.steps.inputs import PromptInputs, schema_needs
from glmbatch.store.errors import one_line
from glmbatch.store.files import DIGEST_CHARS, commit, digest_file, partial_beside
from glmbatch.store.folder import Folder
from glmbatch.store.frames import WHERE, Frame, as_frame
from glmbatch.store.inputs.needs import SchemaNeeds, check_schema
from glmbatch.store.parquet import ROW_GROUP_ROWS, read_columns, write_table
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

OUTPUT = "answers"  # below the folder of a set of steps

AnyTable = TypeVar("AnyTable")
Job = JobConfig | Mapping[str, Any] | str | os.PathLike[str]


def annotate(job: Job) -> Summary:
    """Run a job in this process, without Prefect, and return a summary of what happened.

    `job` is a JobConfig, a mapping of settings, or the path of a job file. Safe to repeat, and
    raises, as `run_job`.
    """
    return run_job(settings_of(job, {}))


def annotate_table(
    table: AnyTable, job: Job, *, cache: str | os.PathLike[str] | None = None
) -> AnyTable:
    """`table` with the answers of `job` in columns after its own.

    A pandas or polars DataFrame is returned as one, with its index. Anything else with an Arrow
    stream (`__arrow_c_stream__`, `__arrow_c_array__`, an Arrow dataset) is read into memory and
    returned as an Arrow table. Settings name a column by its text: "0" for 0. The job may leave out
    `data.input`, `output` and `format`.

    Every row is returned in its place. A row that failed says why in `<step>_error`; failed rows
    end the call only if the job sets `max_error_rate` or `on_error: raise`. The folder `cache`
    keeps the answers, so that later calls ask only about rows that are new. It may be deleted at
    any time.

    InputError when the table does not match the job, or when the model fails on every row of the
    first fragments for one reason. AuditError when an audit of the job fails, TransientError when
    the machine failed.
    """
    frame = as_frame(table)
    if cache is not None:
        answers = answers_to(frame, job, cache).answers
    else:
        settings = _settings_of_table(job)
        inputs = inputs_of(settings)
        columns = _columns(frame, schema_needs(settings, inputs))
        with showing_bar(newest_progress), TemporaryDirectory(prefix="glmbatch-") as folder:
            answers = _uncached(columns, settings, inputs, Path(folder)).answers
    answered: AnyTable = frame.beside(answers)
    return answered


@dataclass(frozen=True, slots=True)
class TableAnswers:
    """The answer columns for each row of a table, and what the run did."""

    answers: pa.Table
    summary: Summary
    questions: Sequence[Question]


def answers_to(frame: Frame, job: Job, cache: str | os.PathLike[str]) -> TableAnswers:
    """The answers to each row of `frame`.

    The folder `cache` keeps the answers. Settings and errors are as for `annotate_table`.
    """
    settings = _settings_of_table(job)
    inputs = inputs_of(settings)
    columns = _columns(frame, schema_needs(settings, inputs))
    with showing_bar(newest_progress):
        return _answers(columns, settings, inputs, Folder(os.fspath(cache)).path)


def first_asked(
    answers: pa.Table, step: str, step_key: str, cache: str | os.PathLike[str]
) -> list[AnswersReceipt]:
    """The receipts that say what the `answers` of `step` took when each prompt was first asked.

    By whichever run of the folder `cache`. Of a receipt that counts other prompts too, this is the
    share of those in `answers`, as if all of its prompts took the same.
    """
    outputs = _outputs(Folder(os.fspath(cache)).path)
    receipts = chain.from_iterable(_asked_in(output, step_key) for output in outputs)
    wanted = set(keys_of(answers, step, WHERE).halves_K.tolist())
    shares = []
    # What a receipt without known answers counts was surely asked then; so these come first.
    for receipt, keys in sorted(receipts, key=lambda one: (one[0].known_rows > 0, one[0].began)):
        mine = wanted.intersection(keys)
        wanted -= mine
        if mine:
            shares.append(_share(receipt, len(mine)))
    return shares


def _asked_in(output: AnyPath, step_key: str) -> Iterator[tuple[AnswersReceipt, list[int]]]:
    """The receipts of an output for which a model was asked, and the row keys of their rows."""
    try:
        for file in Ledger(str(output)).answer_files(step_key):
            parts = _parts_of(file)
            keys = read_keys(file)
            ends = accumulate(part.rows for part in parts)
            for part, end in zip(parts, ends, strict=True):
                is_own_K = (keys.rows_K >= end - part.rows) & (keys.rows_K < end)
                if part.computed_rows:
                    yield part, keys.halves_K[is_own_K].tolist()
    except (GlmbatchError, OSError) as error:
        logger.warning("%s: what its answers took is not counted: %s", output, error)


def _parts_of(file: AnswerFile) -> Sequence[AnswersReceipt]:
    """The receipts of the answers in `file`, in the order of its rows."""
    if not file.is_published:
        bundle = read_receipt(file.path, BundleReceipt)
        return () if bundle is None else bundle.parts
    receipt = read_receipt(file.path, OutputReceipt)
    answers = () if receipt is None else receipt.answers
    return [part for part in answers if part.step == file.step]


def _share(receipt: AnswersReceipt, prompts: int) -> AnswersReceipt:
    """The part of `receipt` that so many of its prompts took."""
    share = prompts / receipt.computed_rows
    counts = {
        "computed_rows": prompts,
        "prompt_tokens": round(share * receipt.prompt_tokens),
        "completion_tokens": round(share * receipt.completion_tokens),
        "seconds": share * receipt.seconds,
    }
    return receipt.model_copy(update=counts)


def _outputs(folder: AnyPath) -> list[AnyPath]:
    """The outputs in the `folder` of a cache, one for each set of steps."""
    return sorted(path.parent for path in folder.glob(f"*/{OUTPUT}/{MANIFEST}"))


def _settings_of_table(job: Job) -> JobConfig:
    """The job with the settings that a table leaves out or cannot have."""
    # A job requires these; `_answers` replaces them with a folder of this call.
    places: dict[str, object] = {
        "data.input": WHERE,
        "data.output": WHERE,
        "data.format": "parquet",
    }
    places |= {"data.columns": None, "evaluate": None}
    settings = settings_of(job, {**places, "data.missing_sources": "keep"})
    for name in ("limit", "where"):
        if getattr(settings.data, name) is not None:
            raise InputError(
                f"{WHERE}: data.{name} is set, but every row of a table is answered. "
                f"Select the rows you want, and unset data.{name}."
            )
    chosen = job.model_fields_set if isinstance(job, JobConfig) else settings.model_fields_set
    if "max_error_rate" in chosen:
        return settings
    # For files the limit guards what is published; here the caller sees every row and its error.
    return settings.model_copy(update={"max_error_rate": 1.0})


def settings_of(job: Job, overrides: Mapping[str, object]) -> JobConfig:
    """The settings of `job`, with `overrides` by their dotted names."""
    if isinstance(job, str | os.PathLike):
        return load_job(os.fspath(job), overrides)
    settings = job.model_dump() if isinstance(job, JobConfig) else job
    return parse_settings("the job", settings, JobConfig, overrides)


def _columns(frame: Frame, needs: SchemaNeeds) -> pa.Table:
    """The columns of `frame` that the job reads. InputError when they do not match the job."""
    read = {column.name for column in needs.read}
    names = frame.names
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    fields = []
    for place, name in enumerate(names):
        kind = pa.null()
        # A duplicate name is left to the check of the schema.
        if name in read and names.count(name) == 1:
            columns[name] = _plain(frame.column(place))
            kind = columns[name].type
        fields.append((name, kind))
    check_schema(WHERE, "", pa.schema(fields), needs, {})
    return pa.table(columns or {"no column is read": pa.nulls(len(frame))})


def _plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """`column` without encodings that only save memory: dictionary and run-end encoding."""
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column


def _uncached(
    columns: pa.Table, job: JobConfig, inputs: dict[str, PromptInputs], folder: Path
) -> TableAnswers:
    """The answers, computed in a `folder` that is deleted after the call."""
    try:
        return _answers(columns, job, inputs, folder)
    except AuditError as error:
        # The finding alone, without the paths of a list and a report that will be deleted.
        found = error.__cause__ if isinstance(error.__cause__, AuditError) else error
        raise AuditError(f"{WHERE}: {found} Without a cache, no answers are kept.") from error
    except (InputError, TransientError) as error:
        inner = rf"{re.escape(str(folder))}[^\s:]*"
        raise type(error)(re.sub(inner, f"{WHERE}'s temporary file", str(error))) from error


@contextmanager
def _naming_the_table(source: AnyPath, output: AnyPath) -> Iterator[None]:
    """Let errors of the block name the caller's table instead of the file made from it."""
    try:
        yield
    except GlmbatchError as error:
        text = str(error).replace(f"{output}: nothing published: ", f"{WHERE}: ")
        for name in (f"{WHERE}: {source.name}", str(source), source.name):
            text = text.replace(name, WHERE)
        raise type(error)(text) from error.__cause__


def _answers(
    columns: pa.Table, job: JobConfig, inputs: dict[str, PromptInputs], folder: AnyPath
) -> TableAnswers:
    """The answers in row order, from a run whose input and output are in `folder`."""
    # A folder per set of steps and weights, because an output holds the answers of one set. A step
    # of several sets takes its answers from all of them.
    questions = resolve_questions(job, inputs, prepare_models(job))
    step_keys = {question.name: question.key for question in questions}
    settings = blake2b(repr(step_keys).encode(), digest_size=DIGEST_CHARS // 2).hexdigest()
    source = _write(columns, folder / settings)
    output = folder / settings / OUTPUT
    others = [str(other) for other in _outputs(folder) if str(other) != str(output)]
    places = {"input": plain(str(source)), "output": plain(str(output))}
    data = job.data.model_copy(update=places)
    # An ordinary file run, so that audits, reuse and failures work the same way.
    with _naming_the_table(source, output):
        own = job.model_copy(update={"data": data, "lineage": None})  # of files that are gone then
        summary = run_job(own, others)
        if summary.unusable:
            raise InputError(summary.unusable[0].reason)
    manifest = Ledger(str(output)).manifest()
    assert manifest is not None  # the run has just published
    names: list[str] = []
    for question in questions:
        names += question.step.answer_columns
        names += calibrated_columns(question.step, question.maps)
    parts = []
    for file in sorted(manifest.files, key=lambda file: file.first_row):
        # A cache also holds the answers of earlier tables.
        if file.source == source.name:
            parts.append(read_columns(output / file.output_name, names))
    return TableAnswers(pa.concat_tables(parts), summary, questions)


def _write(table: pa.Table, folder: AnyPath) -> AnyPath:
    """Write `table` to a Parquet file named by its digest, so that the same rows are the same file.

    Returns its path. The run then sees a table that it answered before as an unchanged input.
    """
    with partial_beside(folder / "table") as partial:
        try:
            write_table(
                partial, table.schema, iter(table.combine_chunks().to_batches(ROW_GROUP_ROWS)), {}
            )
        except pa.ArrowException as error:
            raise InputError(
                f"{WHERE}: columns {table.schema.names} cannot be written as Parquet: "
                f"{one_line(error)}. Convert them to text."
            ) from error
        path = folder / f"{digest_file(partial)[:DIGEST_CHARS]}.parquet"
        commit(partial, path)
    return path
