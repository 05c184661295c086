"""Read this first: one fragment from its source to its committed output, in plain calls. Knows nothing of Prefect.

    plan_run -> open_output -> locate_model, prepare_model -> assign    planning.py: what is to be done
    answer (each step) -> write_output                                  here: one fragment, forward only
    publish                                                             publishing.py: audit, then make it public

Calls give and take small references; rows, tables and models stay inside them. Each is safe to repeat: what lies
on disk, whole, is found and not done again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import pyarrow as pa

from glmbatch.errors import BadRow, UnusableFile
from glmbatch.ledger.delta import delta_schema
from glmbatch.ledger.fragments import read_fragment
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import LENGTH_BIN, AnswersReceipt, OutputReceipt
from glmbatch.report.progress import PROGRESS
from glmbatch.report.summary import Summary
from glmbatch.run.asking import answers_to, keyed, known_answers, prompts_of
from glmbatch.run.canary import check_canary, check_file
from glmbatch.run.planning import (
    Assignment,
    FragmentWork,
    assign,
    job_models,
    locate_model,
    open_output,
    plan_run,
    prepare_model,
)
from glmbatch.run.publish import publish, release
from glmbatch.settings.job import AnyStep, ClassifyStep, JobConfig
from glmbatch.steps.answers import Answer, answers_table
from glmbatch.steps.prompt import Prompt, RowFault, RowValues
from glmbatch.store.parquet import open_parquet, prompt_values
from glmbatch.store.paths import location


def run_job(job: JobConfig) -> Summary:
    """The whole job in this thread, fragment after fragment; what the flow does, without its server and retries."""
    check_file(job)
    run = plan_run(job)
    open_output(job, run)
    try:
        work = assign(
            job, run, [prepare_model(locate_model(model, job.runtime)) for model in job_models(job)]
        )
        answers: dict[str, dict[int, AnswersReceipt]] = {
            each.fragment.name: {} for each in work.fragments
        }
        for steps in work.passes:
            for each in work.fragments:
                for index in steps:
                    answers[each.fragment.name][index] = answer(job, each.assignments[index])
        outputs = [
            write_output(
                job, each, [receipt for _, receipt in sorted(answers[each.fragment.name].items())]
            )
            for each in work.fragments
        ]
        return publish(job, run, outputs, check_canary(job, work.fragments[0].assignments))
    finally:
        release(job, run)


def answer(job: JobConfig, assignment: Assignment) -> AnswersReceipt:
    """Answer one step for every row of one fragment and commit the answers, unless they are there already.

    A fragment that cannot be read gives a receipt that says so; under `on_error: raise` it, or a bad row, is an
    InputError. TransientError when the machine failed.
    """
    ledger, step = Ledger(job.data.output), job.steps[assignment.step_index]
    found = ledger.find_answers(
        assignment.key, assignment.run, assignment.earlier, retry_failed=job.retry_failed
    )
    if found is not None:
        PROGRESS.add(assignment.fragment.rows, computed=False)
        return found
    receipt = AnswersReceipt(
        key=assignment.key,
        run=assignment.run,
        fragment=assignment.fragment.name,
        step=step.name,
        step_key=assignment.step_key,
        model=assignment.model.identity,
        rows=assignment.fragment.rows,
    )
    try:
        rows = read_prompt_rows(job, assignment, ledger)
    except UnusableFile as error:
        if job.on_error == "raise":
            raise
        PROGRESS.add(assignment.fragment.rows, computed=False)
        return receipt.model_copy(update={"unusable": str(error)})
    prompts = prompts_of(job, assignment, step, rows)
    _refuse_under_raise(
        job, assignment, (each.reason if isinstance(each, RowFault) else None for each in prompts)
    )
    keys, asked = keyed(assignment, prompts)
    PROGRESS.add(len(prompts) - len(asked), computed=False)
    known = known_answers(job, assignment, ledger)
    with known.hold(asked) as hold:
        distinct, measured = answers_to(job, assignment, asked, known, hold)
        table = _in_rows(assignment, step, distinct, prompts, keys)
        _refuse_under_raise(job, assignment, table.column(f"{step.name}_error").to_pylist())
        earlier = {
            name: ledger.read_answers(key)[0].run for name, key in assignment.earlier.items()
        }
        counts = _counts(step, table) | {"prompt_lengths": _prompt_lengths(prompts)}
        receipt = receipt.model_copy(update=counts | measured | {"earlier": earlier})
        known.add(ledger.keep_answers(receipt, table))
    return receipt


def read_prompt_rows(job: JobConfig, assignment: Assignment, ledger: Ledger) -> list[RowValues]:
    """For each row of the fragment, the value of each placeholder of the step's prompt.

    Reads only the columns that the prompt names. A row whose earlier step failed carries that in place of the value.
    """
    values: dict[str, Sequence[str | bytes | RowFault | None]] = dict(
        source_values(job, assignment)
    )
    for name, key in assignment.earlier.items():
        values[name] = earlier_answers(ledger.read_answers(key)[1], name)
    return [
        {name: column[row] for name, column in values.items()}
        for row in range(assignment.fragment.rows)
    ]


def source_values(job: JobConfig, assignment: Assignment) -> dict[str, list[str | bytes | None]]:
    """For each placeholder of the step's prompt that is a column of the source, the values of the fragment's rows."""
    columns = job.source_columns(job.steps[assignment.step_index])
    batches = (
        list(read_fragment(assignment.fragment, sorted(set(columns.values())))) if columns else []
    )
    if not batches:
        return {name: [] for name in columns}
    table = pa.Table.from_batches(batches)
    return {name: prompt_values(table.column(column)) for name, column in columns.items()}


def earlier_answers(table: pa.Table, step: str) -> list[str | RowFault]:
    """What a later prompt takes from the answers of `step`, row by row."""
    faults = table.column(f"{step}_error").to_pylist()
    return [
        value if fault is None else RowFault("earlier_step_failed", f"{step} failed: {fault}")
        for value, fault in zip(table.column(step).to_pylist(), faults, strict=True)
    ]


def _in_rows(
    assignment: Assignment,
    step: AnyStep,
    distinct: pa.Table,
    prompts: Sequence[Prompt | RowFault],
    keys: Sequence[bytes | None],
) -> pa.Table:
    """The answer of each row, or why it has no prompt, in the order of the rows."""
    faults = [prompt for prompt in prompts if isinstance(prompt, RowFault)]
    table = pa.concat_tables(
        [distinct, answers_table(step, assignment.model.labels, [Answer(f) for f in faults])]
    )
    place = {
        key: at for at, key in enumerate(distinct.column(f"{assignment.step}_key").to_pylist())
    }
    fault_at = count(len(distinct))
    return table.take(
        pa.array([next(fault_at) if key is None else place[key] for key in keys], pa.int64())
    )


def _prompt_lengths(prompts: Sequence[Prompt | RowFault]) -> dict[int, int]:
    lengths = (len(prompt.ids) for prompt in prompts if isinstance(prompt, Prompt))
    return Counter(length // LENGTH_BIN * LENGTH_BIN for length in lengths)


def _counts(step: AnyStep, table: pa.Table) -> dict[str, Any]:
    def values(end: str) -> list[str]:
        found: list[str] = table.column(step.name + end).drop_null().to_pylist()
        return found

    faults = Counter(values("_error_type"))
    if isinstance(step, ClassifyStep):
        return {"faults": faults, "labels": Counter(values(""))}
    empty = sum(not text.strip() for text in values(""))
    tokens = sum(table.column(f"{step.name}_completion_tokens").drop_null().to_pylist())
    reasons = Counter(values("_finish_reason"))
    return {
        "faults": faults,
        "finish_reasons": reasons,
        "empty_answers": empty,
        "answer_tokens": tokens,
    }


def _refuse_under_raise(
    job: JobConfig, assignment: Assignment, reasons: Iterable[str | None]
) -> None:
    for number, reason in enumerate(reasons, assignment.fragment.first_row):
        if reason is not None and job.on_error == "raise":
            raise BadRow(
                f"{assignment.fragment.path}: row {number}, step {assignment.step!r}: {reason}. "
                "Mend the row, or set on_error to quarantine."
            )


def write_output(
    job: JobConfig, work: FragmentWork, answers: Sequence[AnswersReceipt]
) -> OutputReceipt:
    """Write the fragment's rows, untouched, with all answers beside them; staged, not yet public.

    A fragment that cannot be read gives a receipt that says so; under `on_error: raise` it is an InputError.
    """
    ledger = Ledger(job.data.output)
    receipt = OutputReceipt(
        key=work.key,
        run=work.run,
        fragment=work.fragment,
        output_name=work.fragment.output_name,
        answers=tuple(answers),
    )
    unusable = next((each.unusable for each in answers if each.unusable is not None), None)
    if unusable is not None:
        return receipt.model_copy(update={"unusable": unusable})
    found = ledger.find_output(work.key, answers)
    if found is not None:
        return found
    tables = [ledger.read_answers(each.key)[1] for each in answers]
    faulty = [f"{each.step}_error" for each in answers]
    receipt = receipt.model_copy(update={"faulty_rows": _count_faulty(tables, faulty)})
    try:
        with open_parquet(location(work.fragment.path)) as file:
            source = file.schema_arrow
        schema = pa.schema(
            [*source, *(field for table in tables for field in table.schema)], source.metadata
        )
        if job.data.format == "delta":
            schema = delta_schema(work.fragment.path, schema)
        return ledger.stage_output(receipt, schema, _rows_with_answers(work, schema, tables))
    except UnusableFile as error:
        if job.on_error == "raise":
            raise
        return receipt.model_copy(update={"unusable": str(error)})


def _count_faulty(tables: Sequence[pa.Table], columns: Sequence[str]) -> int:
    faults = zip(
        *(table.column(name).to_pylist() for table, name in zip(tables, columns, strict=True)),
        strict=True,
    )
    return sum(any(fault is not None for fault in row) for row in faults)


def _rows_with_answers(
    work: FragmentWork, schema: pa.Schema, tables: Sequence[pa.Table]
) -> Iterator[pa.RecordBatch]:
    """The source's batches, each with its part of the answers beside it."""
    at = 0
    for batch in read_fragment(work.fragment):
        parts = [table.slice(at, batch.num_rows).combine_chunks() for table in tables]
        columns = [column for part in parts for column in part.columns]
        answers = [pa.concat_arrays(column.chunks) for column in columns]
        written = [
            _as(work, column, field)
            for column, field in zip([*batch.columns, *answers], schema, strict=True)
        ]
        yield pa.RecordBatch.from_arrays(written, schema=schema)
        at += batch.num_rows


def _as(work: FragmentWork, column: pa.Array, field: pa.Field) -> pa.Array:
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:  # nothing is rounded in silence
        raise UnusableFile(
            f"{work.fragment.path}: column {field.name!r} as {field.type}: {error}"
        ) from error
