"""Canaries: rows with known good answers, which a run that asks the model must reproduce.

A model that was damaged, swapped or set up differently gives other answers, even if its files look
right.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError, UnusableFile, some_of
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST, PublishedFile
from glmbatch.ledger.receipts import whole_digest
from glmbatch.report.counts import Audit
from glmbatch.run.ask import Outcome, ask
from glmbatch.run.prompts import (
    as_text,
    build_question_prompts,
    column_texts,
    inputs_of,
    key_prompts,
    rows_of,
    source_values,
)
from glmbatch.run.session import session_of
from glmbatch.run.work import Question, RunContext
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import AnyStep, CanaryConfig, JobConfig
from glmbatch.steps.classify import Choice, Number, Selection
from glmbatch.steps.extract import Extraction
from glmbatch.steps.generate import Writing
from glmbatch.steps.inputs import PromptInputs
from glmbatch.steps.prompt import one_by_one
from glmbatch.store.files import check_file, committed, real_path
from glmbatch.store.inputs.found import Version, given_columns
from glmbatch.store.modes import narrow
from glmbatch.store.parquet import open_parquet, with_constants, write_table
from glmbatch.store.paths import AnyPath
from glmbatch.store.types import take_rows, written_field

logger = logging.getLogger(__name__)

# How much a label's score may change without counting: in bfloat16, other batches change it by
# thousandths.
SCORE_TOLERANCE = 0.02
# At most this many changed rows are listed in a message.
CASES = 5


def freeze(output: str | Path, file: str | Path, rows: int) -> int:
    """Write up to `rows` published rows to `file`, and return how many were written.

    Takes rows on which no step failed, spread over all files of `output`, without the columns of
    which these have types that do not go together. Replaces `file`. Users who may not read the
    published files may not read it either. InputError when there is no such row, or when `file` is
    inside the output. UnusableFile when a published file was changed.
    """
    if rows < 1:
        raise InputError(f"--rows {rows}: a canary needs at least one row. Set --rows.")
    check_file("FILE", file)
    ledger = Ledger(output)
    manifest = ledger.manifest()
    if manifest is None or not manifest.files:
        raise InputError(
            f"{output}: has no {MANIFEST} that lists files, so there are no answers to freeze."
        )
    if real_path(file).is_relative_to(real_path(output)):
        raise InputError(
            f"{file}: is inside the output, where it would be read as answers. Name another place."
        )
    tables = []
    rows_per_file = -(-rows // len(manifest.files))
    for published in manifest.files:
        table = _read_published(ledger.root / published.output_name, published, manifest.version)
        # From every file, because the rows of one day may all be alike.
        tables.append(_spread(_without_faults(table, published.step_keys), rows_per_file))
    frozen = _joined(tables).slice(0, rows)
    if not len(frozen):
        raise InputError(f"{output}: every row has a fault, so there are no answers to freeze.")
    # Without the metadata, because the receipt of an output file would be wrong here.
    schema = frozen.schema.remove_metadata()
    with committed(file, "FILE") as partial:
        write_table(partial, schema, iter(frozen.to_batches()), {})
        narrow(partial, [ledger.root / published.output_name for published in manifest.files])
    return len(frozen)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all `tables`, with the columns that can be one in all of them."""
    names: set[str] = set().union(*(table.column_names for table in tables))
    joined = {name for name in names if _joins(name, tables)}
    if joined < names:
        logger.warning(
            "without column %s, whose types differ between files", some_of(sorted(names - joined))
        )
    parts = []
    for table in tables:  # files of different days may have different columns
        parts.append(table.select([name for name in table.column_names if name in joined]))
    return pa.concat_tables(parts, promote_options="permissive")


def _joins(name: str, tables: Sequence[pa.Table]) -> bool:
    schemas = []
    for table in tables:
        own = [field for field in table.schema if field.name == name]
        if len(own) > 1:
            return False
        schemas.append(pa.schema(own))
    try:
        pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _read_published(path: AnyPath, published: PublishedFile, version: Version | None) -> pa.Table:
    """The columns of a published file and of its folders' names. UnusableFile if it was changed."""
    try:
        with open_parquet(path) as opened:
            table = opened.read()
    except OSError as error:
        raise UnusableFile(f"{path}: is missing. Run the job again.") from error
    lacking = {Columns(step).error for step in published.step_keys} - {*table.column_names}
    if lacking or whole_digest(path) != published.digest:
        raise UnusableFile(
            f"{path}: was changed after it was published, so its answers cannot be trusted. "
            "Run the job again."
        )
    folders = given_columns(published.output_name, version)
    given = {name: folders[name] for name in folders if name not in table.column_names}
    # Earlier outputs may have views, which do not go together with texts.
    table = table.cast(pa.schema([written_field(field) for field in table.schema]))
    return with_constants(table, given)


def _without_faults(table: pa.Table, steps: Mapping[str, str]) -> pa.Table:
    sound = pa.array([True] * len(table), pa.bool_())
    for step in steps:
        sound = pc.and_(sound, table.column(Columns(step).error).is_null().combine_chunks())
    return take_rows(table, pc.indices_nonzero(sound))


def _spread(table: pa.Table, rows: int) -> pa.Table:
    """At most `rows` rows of `table`, evenly spread."""
    stride = max(1, len(table) // rows)
    return take_rows(table, range(0, len(table), stride)[:rows])


def check_canary(
    canary: CanaryConfig | None, questions: Sequence[Question], run: RunContext
) -> list[Audit]:
    """Ask the canary's rows again; for each step, audit the share of answers that changed.

    Returns [] without a canary. Skips steps that asked nothing since the last publication; answers
    of a killed or refused run count as new. A later step's prompts use the frozen answers of
    earlier steps, so each step is judged alone. InputError when the file does not match the job.
    """
    if canary is None:
        return []
    # A step that reused every answer loaded no model, so there is none to check.
    new = set()
    for receipt in session_of(run).ledger.unpublished_receipts():
        if receipt.computed_rows:
            new.add(receipt.step_key)
    asked = [question for question in questions if question.key in new]
    steps = [question.step for question in questions]
    inputs = [question.inputs for question in questions]
    table = _frozen(canary.file, _needed_columns(steps, inputs))
    audits = []
    for question in asked:
        rows = _rows_with_answer(question, table)
        if rows:
            audits.append(_audit(question, table, rows, run, canary.max_change))
    return audits


def check_canary_file(job: JobConfig) -> None:
    """Check the job's canary file before any work. InputError when it cannot be used."""
    if job.canary is None:
        return
    _frozen(job.canary.file, _needed_columns(job.steps, inputs_of(job).values()))


def _needed_columns(steps: Iterable[AnyStep], inputs: Iterable[PromptInputs]) -> set[str]:
    """The columns of a canary row that prompts read, and the answer columns to compare."""
    columns: set[str] = set()
    for read in inputs:
        columns.update([*read.sources.values(), *read.fields])
    for step in steps:
        columns.update(step.answer_columns[:2])  # the answer, and its score or finish reason
    return columns


def _frozen(file: str, columns: set[str]) -> pa.Table:
    try:
        with open_parquet(file) as opened:
            table = opened.read()
    except (UnusableFile, OSError) as error:
        raise InputError(f"{error} Set canary.file.") from error
    missing = sorted(columns - set(table.column_names))
    if missing or not len(table):
        raise InputError(
            f"{file}: has {len(table)} rows, and no column {some_of(missing)}. "
            "Freeze rows of this job again with glmbatch canary; if data.columns is set, it needs "
            "these columns."
        )
    return table


def _rows_with_answer(question: Question, table: pa.Table) -> list[int]:
    """The frozen rows that the step was asked about, whatever its condition is now."""
    answers = table.select(question.step.answer_columns[:2]).to_pylist()
    return [row for row, answer in enumerate(answers) if [*answer.values()] != [None, None]]


def _audit(
    question: Question, whole: pa.Table, rows: Sequence[int], run: RunContext, max_change: float
) -> Audit:
    table = take_rows(whole, rows)
    values = source_values(question.inputs, table)
    # The frozen answers, not this run's, so that each step is judged alone.
    for name in question.inputs.earlier:
        earlier = table.column(name).to_pylist()
        values[name] = [None if answer is None else as_text(answer) for answer in earlier]
    for name in question.inputs.fields:
        values[name] = column_texts(table.column(name))
    frozen = table.select(question.step.answer_columns[:2]).to_pylist()
    prompts = build_question_prompts(question, rows_of(values, len(table)))
    keys, distinct = key_prompts(question, prompts)
    (asked,) = ask([question], one_by_one(distinct), session_of(run), counted=False)
    # In float32 the batch never changes a text; in half precision it changes the rounding.
    exact = question.model.config.dtype == "float32"
    changed = 0
    cases = []
    for row, key, before in zip(rows, keys, frozen, strict=True):
        # A frozen row had an answer, so a row without a prompt now counts as changed.
        outcome = None if key is None else asked.outcomes[key]
        if not _same(question.step, outcome, before, exact):
            changed += 1
            cases.append(_case(question.step, row, before, outcome))
    return Audit(
        step=question.name,
        what=f"share of {len(table)} canary rows that changed",
        measured=changed / len(table),
        allowed=max_change,
        seen=tuple(cases[:CASES]),
    )


def _case(step: AnyStep, row: int, before: dict[str, object], outcome: Outcome | None) -> str:
    """A changed row for a message: its labels, but never its texts, because alerts go anywhere."""
    if isinstance(outcome, Choice | Selection):
        if outcome.answer != before[step.name]:
            return f"row {row} was {before[step.name]!r}, is {outcome.answer!r}"
        return f"row {row} is {outcome.answer!r} still, with another score"
    if isinstance(outcome, Number):
        return f"row {row} was {before[step.name]}, is {outcome.answer}"
    return f"row {row}"


def _same(step: AnyStep, outcome: Outcome | None, before: dict[str, object], exact: bool) -> bool:
    """Whether the answer has not changed.

    In half precision, rounding decides between two tokens of nearly equal likelihood, after which
    the texts differ. So only the first quarter of a text must be the same.
    """
    if isinstance(outcome, Choice | Selection):
        score = before[Columns(step.name).score]
        return (
            isinstance(score, float)
            and outcome.answer == before[step.name]
            and abs(outcome.score - score) <= SCORE_TOLERANCE
        )
    text = before[step.name]
    if isinstance(outcome, Number):
        # Relative too, because numbers have any scale.
        tolerances = {"rel_tol": SCORE_TOLERANCE, "abs_tol": SCORE_TOLERANCE}
        return isinstance(text, float) and math.isclose(outcome.answer, text, **tolerances)
    if isinstance(outcome, Extraction):
        # Without a text, the model abstained from all fields.
        whole = isinstance(text, str) or outcome.text is None
        return text == (outcome.text if whole else dict(outcome.values))
    if not isinstance(outcome, Writing):
        return False
    if exact or not text or outcome.text is None:
        return outcome.text == text
    text = str(text)
    return outcome.text.startswith(text[: -(-len(text) // 4)])
