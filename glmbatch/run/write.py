"""Write the files to publish later: a fragment's rows, unchanged, with all answers beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError, UnusableFile
from glmbatch.ledger.fragments import Fragment, open_fragment, read_fragment
from glmbatch.ledger.ledger import RESULTS, Ledger
from glmbatch.ledger.outputs import Staging
from glmbatch.ledger.receipts import AnswersReceipt, BundleReceipt, OutputReceipt
from glmbatch.ledger.tables.types import FORMATS, table_schema
from glmbatch.run.work import Bundle, Question, RunContext, made_with
from glmbatch.settings.columns import Columns
from glmbatch.steps.calibration import with_calibrated
from glmbatch.store.footers import kept_metadata
from glmbatch.store.tables.fitting import fitted_fields, schema_in
from glmbatch.store.types import converted, times_in_utc, written_fields


def write_outputs(
    bundle: Bundle, answers: Sequence[Sequence[AnswersReceipt]], ledger: Ledger
) -> list[OutputReceipt]:
    """Stage a file for each fragment: its rows with `answers` beside them; return the receipts.

    `answers` are the receipts of each assignment of the bundle, in step order. Safe to repeat: a
    file that is already staged or published is reused. A fragment that cannot be read gives a
    receipt with the reason in `unusable`; under `on_error: raise` it raises InputError.
    """
    for assignment, receipts in zip(bundle.assignments, answers, strict=True):
        if tuple(receipt.key for receipt in receipts) != assignment.answers_keys.fragments:
            raise InputError(
                f"{ledger.root / RESULTS}: a stored result is not the one that its name says, so "
                f"the answers to {bundle.name} are unknown. Delete this folder, and run again."
            )
    questions = [assignment.question for assignment in bundle.assignments]
    tables = _Tables(ledger, questions)
    calibration = made_with(questions)[1]
    outputs = []
    with ledger.outputs.staging() as staging:
        for key, fragment, *receipts in zip(
            bundle.output_keys, bundle.fragments, *answers, strict=True
        ):
            receipt = OutputReceipt(
                key=key,
                run=bundle.run.id,
                fragment=fragment,
                output_name=fragment.output_name,
                answers=tuple(receipts),
                calibration=calibration,
            )
            outputs.append(_write_output(receipt, bundle.run, ledger, tables, staging))
    return outputs


def all_written(bundle: Bundle, answers: Sequence[BundleReceipt], ledger: Ledger) -> bool:
    """Whether each fragment has a file, staged or published, with exactly these answers.

    `answers` are the receipts of the bundle's answers files, in step order.
    """
    steps = []
    for assignment, receipt in zip(bundle.assignments, answers, strict=True):
        by_key = {part.key: part for part in receipt.parts}
        steps.append([by_key[key] for key in assignment.answers_keys.fragments])
    for output_key, *parts in zip(bundle.output_keys, *steps, strict=True):
        if ledger.outputs.find(output_key, parts) is None:
            return False
    return True


class _Tables:
    """The answers of a bundle with their calibrated columns, each file read once, when needed."""

    def __init__(self, ledger: Ledger, questions: Sequence[Question]) -> None:
        self._ledger = ledger
        self._questions = {question.name: question for question in questions}
        self._read: dict[str, dict[str, pa.Table]] = {}

    def of(self, receipt: AnswersReceipt) -> pa.Table:
        """The answers that `receipt` is about. TransientError when there are none."""
        key = receipt.file_key
        if key not in self._read:
            committed, table = self._ledger.read_answers(key)
            question = self._questions[receipt.step]
            table = with_calibrated(question.step, question.maps, table)
            self._read[key] = committed.split(table)
        return self._read[key][receipt.key]


def _write_output(
    receipt: OutputReceipt, run: RunContext, ledger: Ledger, answers: _Tables, staging: Staging
) -> OutputReceipt:
    """Stage the file of one fragment, unless it is staged or published."""
    # A fragment that could not be read for a prompt is not read again for the output.
    for answered in receipt.answers:
        if answered.unusable is not None:
            return receipt.model_copy(update={"unusable": answered.unusable})
    # Staged by this run if the task is a retry, else already published with exactly these answers.
    staged = ledger.outputs.find(receipt.key, receipt.answers)
    if staged is not None:
        return staged
    tables = [answers.of(answered) for answered in receipt.answers]
    faulty_rows = _count_faulty(tables, [answered.step for answered in receipt.answers])
    receipt = receipt.model_copy(update={"faulty_rows": faulty_rows})
    try:
        schema, utc_times = _output_schema(receipt.fragment, run, tables)
        batches = _rows_with_answers(receipt.fragment, schema, tables)
        staged = staging.write(receipt, schema, batches, utc_times=utc_times)
        ledger.note_keys(staged, tables)
        return staged
    except UnusableFile as error:
        if run.raises:
            raise
        return receipt.model_copy(update={"unusable": str(error)})


def _output_schema(
    fragment: Fragment, run: RunContext, tables: Sequence[pa.Table]
) -> tuple[pa.Schema, bool]:
    """The source's fields, then those of each step's answers; and whether its times are in UTC."""
    # From the footer, because a fragment without rows has no batch to take a schema from.
    with open_fragment(fragment) as file:
        source = file.schema_arrow
        utc_times = times_in_utc(file)
        fields = fitted_fields(written_fields(file), fragment.fitted)
        fields = [field for field in fields if fragment.has_out(field.name)]
    for table in tables:
        fields += list(table.schema)
    rows = range(fragment.first_row, fragment.first_row + fragment.rows)
    schema = pa.schema(fields, kept_metadata(source, fields, None if fragment.span else rows))
    if run.format in FORMATS:
        typed = schema_in(fragment.typed)
        schema = table_schema(FORMATS[run.format], fragment.path, schema, typed)
    return schema, utc_times


def _count_faulty(tables: Sequence[pa.Table], steps: Sequence[str]) -> int:
    """The number of rows in which any step failed."""
    if not tables:
        return 0
    faulty = pa.array([False] * len(tables[0]), pa.bool_())
    for table, step in zip(tables, steps, strict=True):
        faulty = pc.or_(faulty, table.column(Columns(step).error).combine_chunks().is_valid())
    return int(pc.sum(faulty).as_py() or 0)


def _rows_with_answers(
    fragment: Fragment, schema: pa.Schema, tables: Sequence[pa.Table]
) -> Iterator[pa.RecordBatch]:
    """The source's batches, each with its part of the answers beside it."""
    first_row = 0
    names = [name for name in schema.names if name in fragment.columns]
    for batch in read_fragment(fragment, names if fragment.columns else None):
        columns = list(batch.columns)
        for table in tables:
            # Answers are in row order, so the same slice holds the same rows.
            part = table.slice(first_row, batch.num_rows).combine_chunks()
            for column in part.columns:
                columns.append(pa.concat_arrays(column.chunks))
        fitting = []
        for column, field in zip(columns, schema, strict=True):
            fitting.append(_cast(fragment, column, field))
        yield pa.RecordBatch.from_arrays(fitting, schema=schema)
        first_row += batch.num_rows


def _cast(fragment: Fragment, column: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return converted(column, field.type)
    except pa.ArrowException as error:  # better a refusal than a silent rounding
        raise UnusableFile(
            f"{fragment.path}: column {field.name!r} as {field.type}: {error}"
        ) from error
