"""A job over a table in memory: what a file run writes, set beside the caller's own columns.

The columns that the prompts name are written to a folder, the very job of a file run answers them
there, and its answers are read back. All other columns never leave memory. Knows no prompts and no
models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from glmbatch.errors import AuditError, InputError
from glmbatch.ledger.fragments import SchemaNeeds, check_schema
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import DIGEST_CHARS
from glmbatch.report.summary import Summary
from glmbatch.run.job import run_job
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import prompt_inputs, resolve_questions, schema_needs
from glmbatch.run.work import PromptInputs
from glmbatch.settings.job import JobConfig, answer_columns
from glmbatch.settings.jobfile import load_job, parse_settings
from glmbatch.store.errors import one_line
from glmbatch.store.files import commit, digest_file, partial_beside
from glmbatch.store.folder import Folder
from glmbatch.store.parquet import READ_BATCH_ROWS, read_columns, write_table
from glmbatch.store.paths import AnyPath

if TYPE_CHECKING:
    import pandas as pd

WHERE = Path("the table")  # what errors call it
AnyTable = TypeVar("AnyTable", bound="pa.Table | pd.DataFrame")
Job = JobConfig | Mapping[str, Any] | str | os.PathLike[str]


def annotate(job: Job) -> Summary:
    """Run a job (its settings, or the path of its file) in this process, and say what happened."""
    return run_job(_settings(job, {}))


def annotate_table(
    table: AnyTable, job: Job, *, cache: str | os.PathLike[str] | None = None
) -> AnyTable:
    """`table`, a DataFrame or Arrow table, with the answers of `job` in columns after its own.

    Rows, their order and an index stay; a row that failed says why in `<step>_error`. The job is
    that of a file run, its audits too, but for `data.input`, `output` and `format`, which it may
    leave out. In the folder `cache` answers are kept, and later calls ask only about rows that are
    new there; it may be deleted at any time.
    """
    # Required of a job file, and replaced by a folder of this call before they are used.
    places = {"data.input": str(WHERE), "data.output": str(WHERE), "data.format": "parquet"}
    settings = _settings(job, {**places, "data.missing_sources": "keep"})
    if settings.data.limit is not None:
        raise InputError(
            f"{WHERE}: every row of a table is answered. "
            "Take the rows you want, and unset data.limit."
        )
    inputs = prompt_inputs(settings)
    columns = _columns(table, schema_needs(settings, inputs))
    if cache is not None:
        answers = _answers(columns, settings, inputs, Folder(os.fspath(cache)).path)
    else:
        with TemporaryDirectory(prefix="glmbatch-") as folder:
            try:
                answers = _answers(columns, settings, inputs, Path(folder))
            except AuditError as error:
                raise AuditError(
                    f"{error} That folder is gone with the call: give a cache to keep it."
                ) from error
    if isinstance(table, pa.Table):
        schema = pa.schema([*table.schema, *answers.schema], table.schema.metadata)
        answered: AnyTable = pa.Table.from_arrays([*table.columns, *answers.columns], schema=schema)
    else:  # as arrays, so that nothing is matched by index, which may repeat
        answered = table.assign(
            **{name: column.array for name, column in answers.to_pandas().items()}
        )
    return answered


def _settings(job: Job, overrides: Mapping[str, object]) -> JobConfig:
    if isinstance(job, str | os.PathLike):
        return load_job(os.fspath(job), overrides)
    settings = job.model_dump() if isinstance(job, JobConfig) else job
    return parse_settings("the job", settings, JobConfig, overrides)


def _columns(table: Any, needs: SchemaNeeds) -> pa.Table:
    """The columns of `table` that the job reads. InputError when they do not fit it."""
    if isinstance(table, pa.Table):
        names = table.schema.names
    else:
        import pandas as pd

        if not isinstance(table, pd.DataFrame):
            raise InputError(
                f"{WHERE}: is a {type(table).__name__}, not a pandas DataFrame or an Arrow table."
            )
        names = list(table.columns)
    read = {column.name for column in needs.read}
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    fields = []
    for name in names:
        kind = pa.null()
        # A name that stands twice is left to the check of the schema.
        if name in read and names.count(name) == 1:
            columns[name] = _as_arrow(name, table[name])
            kind = columns[name].type
        fields.append((str(name), kind))
    check_schema(WHERE, "", pa.schema(fields), needs)
    return pa.table(columns or {"no column is read": pa.nulls(len(table))})


def _as_arrow(name: str, column: Any) -> pa.Array | pa.ChunkedArray:
    if isinstance(column, pa.ChunkedArray):  # of an Arrow table
        return column
    try:
        values = pa.Array.from_pandas(column)
        # A pandas column without any value is one of floats, whatever it was to hold.
        return pa.nulls(len(values)) if values.null_count == len(values) else values
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise InputError(
            f"{WHERE}: column {name!r} has no one type: {one_line(error)}. Make it text."
        ) from error


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
                partial, table.schema, iter(table.combine_chunks().to_batches(READ_BATCH_ROWS)), {}
            )
        except pa.ArrowException as error:
            raise InputError(
                f"{WHERE}: cannot be written as Parquet: {error}. Change the types."
            ) from error
        path = folder / f"{digest_file(partial)[:DIGEST_CHARS]}.parquet"
        commit(partial, path)
    return path
