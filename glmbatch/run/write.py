"""Write the file to publish later: a fragment's rows, unchanged, with all answers beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError, UnusableFile
from glmbatch.ledger.delta.types import delta_schema, typed_columns
from glmbatch.ledger.fragments import read_fragment
from glmbatch.ledger.ledger import RESULTS, Ledger
from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.run.work import FragmentWork
from glmbatch.settings.columns import Columns
from glmbatch.store.footers import kept_metadata
from glmbatch.store.parquet import open_parquet
from glmbatch.store.types import converted, times_in_utc, written_fields


def write_output(
    work: FragmentWork, answers: Sequence[AnswersReceipt], ledger: Ledger
) -> OutputReceipt:
    """Stage a file of the fragment's rows with `answers` beside them, and return its receipt.

    `answers` are the receipts of the fragment's assignments, in step order. Safe to repeat: a file
    that is already staged or published is reused. A fragment that cannot be read gives a receipt
    with the reason in `unusable`; under `on_error: raise` it raises InputError.
    """
    keys = [assignment.key for assignment in work.assignments]
    if [answered.key for answered in answers] != keys:
        raise InputError(
            f"{ledger.root / RESULTS}: a stored result is not the one that its name says, so the "
            f"answers to {work.fragment.name} are unknown. Delete this folder, and run again."
        )
    receipt = OutputReceipt(
        key=work.key,
        run=work.run.id,
        fragment=work.fragment,
        output_name=work.fragment.output_name,
        answers=tuple(answers),
    )
    # A fragment that could not be read for a prompt is not read again for the output.
    for answered in answers:
        if answered.unusable is not None:
            return receipt.model_copy(update={"unusable": answered.unusable})
    # Staged by this run if the task is a retry, else already published with exactly these answers.
    staged = ledger.find_output(work.key, answers)
    if staged is not None:
        return staged
    tables = [ledger.read_answers(answered.key)[1] for answered in answers]
    faulty_rows = _count_faulty(tables, [answered.step for answered in answers])
    receipt = receipt.model_copy(update={"faulty_rows": faulty_rows})
    try:
        schema, utc_times = _output_schema(work, tables)
        batches = _rows_with_answers(work, schema, tables)
        staged = ledger.stage_output(receipt, schema, batches, utc_times=utc_times)
        ledger.note_keys(staged, tables)
        return staged
    except UnusableFile as error:
        if work.run.raises:
            raise
        return receipt.model_copy(update={"unusable": str(error)})


def _output_schema(work: FragmentWork, tables: Sequence[pa.Table]) -> tuple[pa.Schema, bool]:
    """The source's fields, then those of each step's answers; and whether its times are in UTC."""
    fragment = work.fragment
    # From the footer, because a fragment without rows has no batch to take a schema from.
    with open_parquet(fragment.path, fragment.unit) as file:
        source = file.schema_arrow
        utc_times = times_in_utc(file)
        fields = written_fields(file)
    for table in tables:
        fields += list(table.schema)
    rows = range(fragment.first_row, fragment.first_row + fragment.rows)
    schema = pa.schema(fields, kept_metadata(source, fields, rows))
    if work.run.format == "delta":
        schema = delta_schema(fragment.path, schema, typed_columns(fragment.typed))
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
    work: FragmentWork, schema: pa.Schema, tables: Sequence[pa.Table]
) -> Iterator[pa.RecordBatch]:
    """The source's batches, each with its part of the answers beside it."""
    first_row = 0
    for batch in read_fragment(work.fragment):
        columns = list(batch.columns)
        for table in tables:
            # Answers are in row order, so the same slice holds the same rows.
            part = table.slice(first_row, batch.num_rows).combine_chunks()
            for column in part.columns:
                columns.append(pa.concat_arrays(column.chunks))
        fitting = []
        for column, field in zip(columns, schema, strict=True):
            fitting.append(_cast(work, column, field))
        yield pa.RecordBatch.from_arrays(fitting, schema=schema)
        first_row += batch.num_rows


def _cast(work: FragmentWork, column: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return converted(column, field.type)
    except pa.ArrowException as error:  # better a refusal than a silent rounding
        raise UnusableFile(
            f"{work.fragment.path}: column {field.name!r} as {field.type}: {error}"
        ) from error
