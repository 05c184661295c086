"""The end of a run: collect, audit, then publish or refuse, and report either way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from glmbatch.errors import AuditError, BadRow, GlmbatchError
from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest, StepOrigin, next_manifest, staying
from glmbatch.ledger.publication import publish as make_public
from glmbatch.ledger.publication import read_quarantine, write_refused
from glmbatch.ledger.receipts import DIGEST_CHARS, OutputReceipt
from glmbatch.ledger.rowkeys import answer_settings
from glmbatch.report.report import write_report
from glmbatch.report.summary import Summary, step_summary
from glmbatch.run.audits import Audit, audit
from glmbatch.run.work import Question, Run
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import JobConfig
from glmbatch.store.parquet import prompt_values, read_columns
from glmbatch.store.paths import side_by_side

SAMPLE_ROWS = 3
# Lines in a list for people, of a run in which perhaps every row failed.
MOST_REFUSED = 100_000
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("row", pa.int64()),  # number in the file, from 0; null for a whole file
        pa.field("id", pa.string()),
        pa.field("step", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a run has made.

    `outputs` of all fragments, of them those `written`, and the files and fragments that are left
    out. `before` is what is published now, by `last_run` if that is another run.
    """

    ledger: Ledger
    before: Manifest | None
    last_run: str | None
    outputs: list[OutputReceipt]
    written: list[OutputReceipt]
    unusable: list[FileFault]


def publish(
    job: JobConfig,
    run: Run,
    questions: Sequence[Question],
    outputs: Sequence[OutputReceipt],
    canaries: Sequence[Audit] = (),
) -> Summary:
    """Audit the staged outputs, make them public, and say what happened.

    AuditError, and nothing is published, when rows are missing or more of them failed than the job
    allows.
    """
    collected = _collect(run, outputs)
    summary = _summarize(run, questions, collected)
    try:
        audits = audit(job, run, collected.outputs, collected.ledger.published_receipts(), canaries)
    except AuditError as error:
        listed = _list_refused(collected, job.data.id_column)
        summary = summary.model_copy(update={"refused": str(error)})
        report = write_report(job, summary, collected.written, collected.last_run)
        about = f" Read about the run: {report}." if report else ""
        raise AuditError(f"{error}{listed}{about}") from error
    faults = list(_failed_rows(collected, job.data.id_column))
    if faults and run.context.raises:
        raise _bad_row(run, faults[0])
    drop_missing = job.data.missing_sources == "drop"
    kept_sources = _release(run, questions, collected, faults, drop_missing=drop_missing)
    summary = summary.model_copy(
        update={
            "quarantined": job.on_error == "quarantine" and bool(faults),
            "kept_sources": kept_sources,
            "audits": audits,
            "seconds": time.time() - run.context.began,
        }
    )
    report = write_report(job, summary, collected.written, collected.last_run)
    return summary.model_copy(update={"report": report})


def _collect(run: Run, outputs: Sequence[OutputReceipt]) -> Collected:
    ledger = Ledger(run.context.output)
    current = list(
        side_by_side(ledger.root, lambda output: _with_receipts(ledger, output), outputs)
    )
    written = []
    unusable = list(run.plan.unusable)
    for output in current:
        if output.unusable is None:
            written.append(_named(run, output))
            continue
        fragment = output.fragment
        unusable.append(
            FileFault(source=fragment.source, first_row=fragment.first_row, reason=output.unusable)
        )
    before = ledger.manifest()
    # A killed publication of this very run, tried again, has itself before it.
    last_run = before.run if before and before.run != run.context.id else None
    return Collected(ledger, before, last_run, current, written, unusable)


def _with_receipts(ledger: Ledger, output: OutputReceipt) -> OutputReceipt:
    """The output with the receipts on disk; a task's cached output may hold older ones."""
    if output.unusable is not None:
        return output
    receipts = tuple(ledger.answers_receipt(receipt.key) for receipt in output.answers)
    return output.model_copy(update={"answers": receipts})


def _named(run: Run, output: OutputReceipt) -> OutputReceipt:
    """The output under its published name: in a Delta table the digest is part of it."""
    if run.context.format == "parquet":
        return output
    stem = output.fragment.output_name.removesuffix(".parquet")
    name = f"{stem}.{output.digest[:DIGEST_CHARS]}.parquet"
    return output.model_copy(update={"output_name": name})


def _summarize(run: Run, questions: Sequence[Question], collected: Collected) -> Summary:
    """What was done, before anything is published."""
    written = collected.written
    steps = []
    for index, question in enumerate(questions):
        receipts = [output.answers[index] for output in written]
        steps.append(step_summary(question.name, run.context.id, receipts))
    return Summary(
        run=run.context.id,
        output=run.context.output,
        rows=sum(output.fragment.rows for output in written),
        faulty_rows=sum(output.faulty_rows for output in written),
        fragments=len(written),
        unusable=tuple(collected.unusable),
        quarantined=False,
        kept_sources=0,
        steps=tuple(steps),
        samples=tuple(_samples(questions, collected)),
        audits=(),
        seconds=time.time() - run.context.began,
    )


def _list_refused(collected: Collected, id_column: str | None) -> str:
    """Keep the list of failed rows of a run that publishes nothing; where it is, as a sentence."""
    lines = list(islice(_failed_rows(collected, id_column), MOST_REFUSED))
    if not lines:
        return ""
    try:
        failed = pa.Table.from_pylist(lines, QUARANTINE_SCHEMA)
        path = write_refused(collected.ledger.root, failed)
    except GlmbatchError as error:  # what the audit found matters more
        return f" They are not listed: {error}"
    return f" Each row that failed: {path}."


def _bad_row(run: Run, fault: dict[str, Any]) -> BadRow:
    return BadRow(
        f"{run.context.output}: nothing published: {fault['source']}: row {fault.get('row')}, step "
        f"{fault.get('step')!r}: {fault['error']}. Mend the row, or set on_error to quarantine."
    )


def _release(
    run: Run,
    questions: Sequence[Question],
    collected: Collected,
    faults: Sequence[dict[str, Any]],
    *,
    drop_missing: bool,
) -> int:
    """Publish what was written; returns how many sources of earlier runs stay published."""
    stay = staying(
        collected.before,
        run.plan,
        written=[output.fragment for output in collected.written],
        damaged={fault.source for fault in collected.unusable},
        step_keys={question.name: question.key for question in questions},
        drop_missing=drop_missing,
    )
    origins = {}
    for question in questions if collected.written else ():
        settings = answer_settings(question.step)
        origins[question.name] = StepOrigin(settings=settings, model=question.model.identity)
    manifest = next_manifest(
        run.context.id,
        run.plan,
        collected.before,
        written=collected.written,
        stay=stay,
        unusable=collected.unusable,
        steps=origins,
        format=run.context.format,
    )
    ledger = collected.ledger
    lines = [*read_quarantine(ledger.root, stay), *faults]
    failed = pa.Table.from_pylist(lines, QUARANTINE_SCHEMA)
    make_public(ledger, manifest, collected.written, failed)
    tonight = {output.fragment.source for output in collected.written}
    return len({file.source for file in stay} - tonight)


def _samples(questions: Sequence[Question], collected: Collected) -> list[dict[str, Any]]:
    """A few rows without fault, with text and answers, from the first fragment that has some."""
    columns: list[str] = []
    for question in questions:
        columns += question.inputs.columns.values()
    columns = list(dict.fromkeys(columns))
    for output in collected.written:
        if output.faulty_rows == output.fragment.rows or not columns:
            continue
        steps = [receipt.step for receipt in output.answers]
        errors = [Columns(step).error for step in steps]
        path = collected.ledger.output_path(output)
        table = read_columns(path, [*columns, *steps, *errors])
        faults = [table.column(error).to_pylist() for error in errors]
        rows: list[int] = []
        for row, reasons in enumerate(zip(*faults, strict=True)):
            if not any(reasons) and len(rows) < SAMPLE_ROWS:
                rows.append(row)
        return [_sample(table, [*columns, *steps], row) for row in rows]
    return []


def _sample(table: pa.Table, names: Sequence[str], row: int) -> dict[str, Any]:
    return {name: prompt_values(table.column(name).slice(row, 1))[0] for name in names}


def _failed_rows(collected: Collected, id_column: str | None) -> Iterator[dict[str, Any]]:
    """A line for each file left out and for each step of each row that failed."""
    for fault in collected.unusable:
        yield {
            "source": fault.source,
            "row": fault.first_row,
            "error_type": "unusable_file",
            "error": fault.reason,
        }
    ledger = collected.ledger
    faulty = [output for output in collected.written if output.faulty_rows]
    tables = side_by_side(
        ledger.root, lambda output: _read_failures(ledger, output, id_column), faulty
    )
    for output, table in zip(faulty, tables, strict=True):
        yield from _failures_of(output, table, id_column)


def _read_failures(ledger: Ledger, output: OutputReceipt, id_column: str | None) -> pa.Table:
    """The columns of an output file that say which rows failed."""
    columns = [] if id_column is None else [id_column]
    for receipt in output.answers:
        answers = Columns(receipt.step)
        columns += [answers.error, answers.error_type]
    return read_columns(ledger.output_path(output), columns)


def _failures_of(
    output: OutputReceipt, table: pa.Table, id_column: str | None
) -> Iterator[dict[str, Any]]:
    fragment = output.fragment
    ids: list[Any] = [None] * fragment.rows
    if id_column is not None:
        ids = prompt_values(table.column(id_column))
    for receipt in output.answers:
        columns = Columns(receipt.step)
        reasons = table.column(columns.error).to_pylist()
        kinds = table.column(columns.error_type).to_pylist()
        for row, reason in enumerate(reasons):
            if reason is not None:
                yield {
                    "source": fragment.source,
                    "row": fragment.first_row + row,
                    "id": None if ids[row] is None else str(ids[row]),
                    "step": receipt.step,
                    "error_type": kinds[row],
                    "error": reason,
                }
