"""The end of a run: audit what is staged, make it public, count what was done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from glmbatch.errors import AuditError, BadRow, GlmbatchError
from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import StepOrigin, merged_manifest
from glmbatch.ledger.publication import publish as make_public
from glmbatch.ledger.publication import read_quarantine, write_refused
from glmbatch.ledger.receipts import DIGEST_CHARS, OutputReceipt
from glmbatch.ledger.rowkeys import answer_settings
from glmbatch.report.report import write_report
from glmbatch.report.summary import Summary, step_summary
from glmbatch.run.asking import forget_answers
from glmbatch.run.audits import Audit, audit
from glmbatch.run.planning import Run
from glmbatch.settings.job import JobConfig
from glmbatch.store.parquet import prompt_values, read_columns
from glmbatch.store.paths import side_by_side

SAMPLE_ROWS = 3
MOST_REFUSED = 100_000  # lines of a list for people, of a run in which perhaps every row failed
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field(
            "row", pa.int64()
        ),  # number in the file, from 0; null where the whole file is left out
        pa.field("id", pa.string()),
        pa.field("step", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
    ]
)


def publish(
    job: JobConfig, run: Run, outputs: Sequence[OutputReceipt], canaries: Sequence[Audit] = ()
) -> Summary:
    """Audit the staged outputs, make them public, and say what happened.

    AuditError, and nothing is published, when rows are missing or more of them failed than the job allows.
    """
    ledger = Ledger(job.data.output)
    before = ledger.manifest()
    outputs = [*side_by_side(ledger.root, lambda output: _with_receipts(ledger, output), outputs)]
    written = [_named(job, each) for each in outputs if each.unusable is None]
    unusable = [
        *run.plan.unusable,
        *(
            FileFault(
                source=each.fragment.source, first_row=each.fragment.first_row, reason=each.unusable
            )
            for each in outputs
            if each.unusable is not None
        ),
    ]
    samples = _samples(job, ledger, written)
    last = before.run if before and before.run != run.id else None
    summary = _summary(job, run, written, unusable, samples)
    try:
        audits = audit(job, run, outputs, ledger.published_receipts(), canaries)
    except AuditError as error:
        listed = _refused(ledger, _quarantined(job, ledger, written, unusable))
        report = write_report(
            job, summary.model_copy(update={"refused": str(error)}), written, last
        )
        told = f" Read about the run: {report}." if report else ""
        raise AuditError(f"{error}{listed}{told}") from error
    faults = list(_quarantined(job, ledger, written, unusable))
    if faults and job.on_error == "raise":
        first = faults[0]
        raise BadRow(
            f"{job.data.output}: nothing published: {first['source']}: row {first.get('row')}, step "
            f"{first.get('step')!r}: {first['error']}. Mend the row, or set on_error to quarantine."
        )
    manifest = merged_manifest(
        run.id,
        run.plan,
        before,
        written,
        unusable,
        keep_missing=job.data.missing_sources == "keep",
        format=job.data.format,
    )
    paths = [ledger.root / name for name in manifest.replaced]
    there = side_by_side(ledger.root, lambda path: path.exists(), paths)
    replaced = tuple(
        name for name, is_there in zip(manifest.replaced, there, strict=True) if is_there
    )
    manifest = manifest.model_copy(update={"steps": _origins(job, written), "replaced": replaced})
    stay = {file.source for file in manifest.files} - {output.fragment.source for output in written}
    lines = [*read_quarantine(ledger.root, stay), *faults]
    make_public(ledger, manifest, written, pa.Table.from_pylist(lines, QUARANTINE_SCHEMA))
    published = {
        "quarantined": job.on_error == "quarantine" and bool(faults),
        "kept_sources": len(stay),
        "audits": audits,
        "seconds": time.time() - run.began,
    }
    summary = summary.model_copy(update=published)
    return summary.model_copy(update={"report": write_report(job, summary, written, last)})


def _summary(
    job: JobConfig,
    run: Run,
    written: Sequence[OutputReceipt],
    unusable: Sequence[FileFault],
    samples: Sequence[dict[str, Any]],
) -> Summary:
    """What was done, before anything is published."""
    return Summary(
        run=run.id,
        output=job.data.output,
        rows=sum(output.fragment.rows for output in written),
        faulty_rows=sum(output.faulty_rows for output in written),
        fragments=len(written),
        unusable=tuple(unusable),
        quarantined=False,
        kept_sources=0,
        steps=tuple(
            step_summary(step.name, run.id, [output.answers[index] for output in written])
            for index, step in enumerate(job.steps)
        ),
        samples=tuple(samples),
        audits=(),
        seconds=time.time() - run.began,
    )


def _refused(ledger: Ledger, faults: Iterator[dict[str, Any]]) -> str:
    """Keep the first of the failed rows of a run that publishes nothing; where they are listed, as a sentence."""
    lines = list(islice(faults, MOST_REFUSED))
    if not lines:
        return ""
    try:
        path = write_refused(ledger.root, pa.Table.from_pylist(lines, QUARANTINE_SCHEMA))
        return f" Each row that failed: {path}."
    except GlmbatchError as error:  # what the audit found matters more
        return f" They are not listed: {error}"


def _origins(job: JobConfig, written: Sequence[OutputReceipt]) -> dict[str, StepOrigin]:
    models = {receipt.step: receipt.model for output in written[:1] for receipt in output.answers}
    settings = {step.name: answer_settings(step) for step in job.steps}
    return {
        step: StepOrigin(settings=settings[step], model=model) for step, model in models.items()
    }


def _with_receipts(ledger: Ledger, output: OutputReceipt) -> OutputReceipt:
    """The output with the receipts of the answers as they lie on disk: a cached output may tell of an older run's."""
    if output.unusable is not None:
        return output
    return output.model_copy(
        update={"answers": tuple(ledger.answers_receipt(each.key) for each in output.answers)}
    )


def release(job: JobConfig, run: Run) -> None:
    """Let go of what `run` held, published or not: its output's lock, and what it remembered of the answers there."""
    forget_answers(job.data.output)
    Ledger(job.data.output).close(run.id)


def _named(job: JobConfig, output: OutputReceipt) -> OutputReceipt:
    """The output under the name it is published by: in a Delta table a file never changes, so its digest joins it."""
    if job.data.format == "parquet":
        return output
    name = f"{output.fragment.output_name.removesuffix('.parquet')}.{output.digest[:DIGEST_CHARS]}.parquet"
    return output.model_copy(update={"output_name": name})


def _samples(
    job: JobConfig, ledger: Ledger, written: Sequence[OutputReceipt]
) -> list[dict[str, Any]]:
    """A few rows without fault, from the first fragment that has some, with their text and answers."""
    columns = list(
        dict.fromkeys(column for step in job.steps for column in job.source_columns(step).values())
    )
    for output in written:
        if output.faulty_rows == output.fragment.rows or not columns:
            continue
        steps = [receipt.step for receipt in output.answers]
        table = read_columns(
            ledger.output_path(output), [*columns, *steps, *(f"{step}_error" for step in steps)]
        )
        faults = [table.column(f"{step}_error").to_pylist() for step in steps]
        fine = [row for row, reasons in enumerate(zip(*faults, strict=True)) if not any(reasons)][
            :SAMPLE_ROWS
        ]
        names = [*columns, *steps]
        return [
            {name: prompt_values(table.column(name).slice(row, 1))[0] for name in names}
            for row in fine
        ]
    return []


def _quarantined(
    job: JobConfig, ledger: Ledger, written: Sequence[OutputReceipt], unusable: Sequence[FileFault]
) -> Iterator[dict[str, Any]]:
    """A line for each file left out and for each step of each row that failed."""
    for fault in unusable:
        yield {
            "source": fault.source,
            "row": fault.first_row,
            "error_type": "unusable_file",
            "error": fault.reason,
        }
    faulty = [output for output in written if output.faulty_rows]
    tables = side_by_side(ledger.root, lambda output: _failures(job, ledger, output), faulty)
    for output, table in zip(faulty, tables, strict=True):
        fragment = output.fragment
        ids: list[Any] = [None] * fragment.rows
        if job.data.id_column is not None:
            ids = prompt_values(table.column(job.data.id_column))
        for receipt in output.answers:
            reasons, kinds = (
                table.column(f"{receipt.step}{end}").to_pylist()
                for end in ("_error", "_error_type")
            )
            for at, reason in enumerate(reasons):
                if reason is not None:
                    yield {
                        "source": fragment.source,
                        "row": fragment.first_row + at,
                        "id": None if ids[at] is None else str(ids[at]),
                        "step": receipt.step,
                        "error_type": kinds[at],
                        "error": reason,
                    }


def _failures(job: JobConfig, ledger: Ledger, output: OutputReceipt) -> pa.Table:
    """The columns of an output file that say which rows failed."""
    columns = [
        f"{receipt.step}{end}" for receipt in output.answers for end in ("_error", "_error_type")
    ]
    columns += [] if job.data.id_column is None else [job.data.id_column]
    return read_columns(ledger.output_path(output), columns)
