"""A job over a table in memory: what a file run writes, set beside the caller's own columns.

The columns that the prompts name are written to a folder, the very job of a file run answers them
there, and its answers are read back. All other columns never leave memory. Knows no prompts, no
models, and no kinds of tables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import AuditError, GlmbatchError, InputError, TransientError
from glmbatch.ledger.ledger import Ledger
from glmbatch.report.display import showing_bar
from glmbatch.report.summary import Summary
from glmbatch.run.job import run_job
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import prompt_inputs, resolve_questions, schema_needs
from glmbatch.run.session import newest_progress
from glmbatch.run.work import PromptInputs
from glmbatch.settings.job import JobConfig, answer_columns
from glmbatch.settings.jobfile import load_job, parse_settings
from glmbatch.store.errors import one_line
from glmbatch.store.files import DIGEST_CHARS, commit, digest_file, partial_beside
from glmbatch.store.folder import Folder
from glmbatch.store.frames import WHERE, Frame, as_frame
from glmbatch.store.inputs.needs import SchemaNeeds, check_schema
from glmbatch.store.parquet import ROW_GROUP_ROWS, read_columns, write_table
from glmbatch.store.paths import AnyPath

AnyTable = TypeVar("AnyTable")
Job = JobConfig | Mapping[str, Any] | str | os.PathLike[str]


def annotate(job: Job) -> Summary:
    """Run a job (its settings, or the path of its file) in this process, and say what happened."""
    return run_job(_settings(job, {}))


def annotate_table(
    table: AnyTable, job: Job, *, cache: str | os.PathLike[str] | None = None
) -> AnyTable:
    """`table` with the answers of `job` in columns after its own.

    A pandas or polars DataFrame comes back as one, index and all. Whatever else has an Arrow stream
    (`__arrow_c_stream__`, `__arrow_c_array__`, an Arrow dataset) is read into memory and comes back
    as an Arrow table. Settings name a column by its text: "0" for 0.

    Every row comes back in its place; one that failed says why in `<step>_error`. Only where the
    job itself sets `max_error_rate`, or `on_error: raise`, rows that fail end the call. Its other
    audits hold. A model that fails on every row of the first fragments for one reason is broken:
    that is an InputError, before the other rows are asked. `data.input`, `output` and `format` may
    be left out. In the folder `cache` answers are kept, and later calls ask only about rows that
    are new there; it may be deleted at any time.
    """
    settings = _settings_of_table(job)
    inputs = prompt_inputs(settings)
    frame = as_frame(table)
    columns = _columns(frame, schema_needs(settings, inputs))
    with showing_bar(newest_progress):
        if cache is not None:
            answers = _answers(columns, settings, inputs, Folder(os.fspath(cache)).path)
        else:
            with TemporaryDirectory(prefix="glmbatch-") as folder:
                answers = _uncached(columns, settings, inputs, Path(folder))
    answered: AnyTable = frame.beside(answers)
    return answered


def _settings_of_table(job: Job) -> JobConfig:
    """The job with what a table leaves out or cannot have."""
    # Required of a job file, and replaced by a folder of this call before they are used.
    places = {"data.input": WHERE, "data.output": WHERE, "data.format": "parquet"}
    settings = _settings(job, {**places, "data.missing_sources": "keep"})
    if settings.data.limit is not None:
        raise InputError(
            f"{WHERE}: every row of a table is answered. "
            "Take the rows you want, and unset data.limit."
        )
    chosen = job.model_fields_set if isinstance(job, JobConfig) else settings.model_fields_set
    if "max_error_rate" in chosen:
        return settings
    # Over files it guards what is published; here the caller has every row and its error at hand.
    return settings.model_copy(update={"max_error_rate": 1.0})


def _settings(job: Job, overrides: Mapping[str, object]) -> JobConfig:
    if isinstance(job, str | os.PathLike):
        return load_job(os.fspath(job), overrides)
    settings = job.model_dump() if isinstance(job, JobConfig) else job
    return parse_settings("the job", settings, JobConfig, overrides)


def _columns(frame: Frame, needs: SchemaNeeds) -> pa.Table:
    """The columns of `frame` that the job reads. InputError when they do not fit it."""
    read = {column.name for column in needs.read}
    names = frame.names
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    fields = []
    for place, name in enumerate(names):
        kind = pa.null()
        # A name that stands twice is left to the check of the schema.
        if name in read and names.count(name) == 1:
            columns[name] = _plain(frame.column(place))
            kind = columns[name].type
        fields.append((name, kind))
    check_schema(Path(WHERE), "", pa.schema(fields), needs)
    return pa.table(columns or {"no column is read": pa.nulls(len(frame))})


def _plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """`column` without the encodings that only save memory: categories, and runs of one value."""
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column


def _uncached(
    columns: pa.Table, job: JobConfig, inputs: dict[str, PromptInputs], folder: Path
) -> pa.Table:
    """The answers by way of a `folder` that is gone with the call."""
    try:
        return _answers(columns, job, inputs, folder)
    except AuditError as error:
        # What was found, without where a list and a report would be.
        found = error.__cause__ if isinstance(error.__cause__, AuditError) else error
        raise AuditError(
            f"{WHERE}: {found} Without a cache nothing is kept of the call."
        ) from error
    except (InputError, TransientError) as error:
        inner = rf"{re.escape(str(folder))}[^\s:]*"
        raise type(error)(re.sub(inner, f"{WHERE}'s temporary file", str(error))) from error


@contextmanager
def _naming_the_table(source: AnyPath, output: AnyPath) -> Iterator[None]:
    """Errors of the block with the caller's table in place of the file made of it."""
    try:
        yield
    except GlmbatchError as error:
        text = str(error).replace(f"{output}: nothing published: ", f"{WHERE}: ")
        for name in (f"{WHERE}: {source.name}", str(source), source.name):
            text = text.replace(name, WHERE)
        raise type(error)(text) from error.__cause__


def _answers(
    columns: pa.Table, job: JobConfig, inputs: dict[str, PromptInputs], folder: AnyPath
) -> pa.Table:
    """The answer columns, row for row, by a run whose input and output lie in `folder`."""
    # An output holds the answers of one set of steps and weights.
    questions = resolve_questions(job, inputs, prepare_models(job))
    step_keys = {question.name: question.key for question in questions}
    settings = blake2b(repr(step_keys).encode(), digest_size=DIGEST_CHARS // 2).hexdigest()
    source = _write(columns, folder / settings)
    output = folder / settings / "answers"
    data = job.data.model_copy(update={"input": str(source), "output": str(output)})
    # The very job of a file run, so that audits, reuse and failures are the same.
    with _naming_the_table(source, output):
        summary = run_job(job.model_copy(update={"data": data}))
        if summary.unusable:
            raise InputError(summary.unusable[0].reason)
    manifest = Ledger(str(output)).manifest()
    assert manifest is not None  # the run has just published
    names: list[str] = []
    for step in job.steps:
        names += answer_columns(step)
    parts = []
    for file in sorted(manifest.files, key=lambda file: file.first_row):
        # A cache holds the answers of earlier tables too.
        if file.source == source.name:
            parts.append(read_columns(output / file.output_name, names))
    return pa.concat_tables(parts)


def _write(table: pa.Table, folder: AnyPath) -> AnyPath:
    """The Parquet file of `table`, named by its bytes: the same rows are the same file."""
    # So a table that is asked about again is an input that has not changed.
    with partial_beside(folder / "table") as partial:
        try:
            write_table(
                partial, table.schema, iter(table.combine_chunks().to_batches(ROW_GROUP_ROWS)), {}
            )
        except pa.ArrowException as error:
            raise InputError(
                f"{WHERE}: columns {table.schema.names} cannot be kept as Parquet: "
                f"{one_line(error)}. Make them text."
            ) from error
        path = folder / f"{digest_file(partial)[:DIGEST_CHARS]}.parquet"
        commit(partial, path)
    return path
