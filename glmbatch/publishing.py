"""The end of a run: audit what is staged, make it public, say what happened."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from glmbatch.asking import forget_answers
from glmbatch.audits import Audit, audit, total
from glmbatch.config import JobConfig
from glmbatch.data.delta import is_table
from glmbatch.data.fragments import FileFault
from glmbatch.data.ledger import (
    DIGEST_CHARS,
    QUARANTINE,
    AnswersReceipt,
    Ledger,
    OutputReceipt,
    StepOrigin,
    merged_manifest,
)
from glmbatch.data.objects import location
from glmbatch.data.parquet import prompt_values, read_columns
from glmbatch.data.rowkeys import answer_settings
from glmbatch.errors import AuditError, BadRow, GlmbatchError
from glmbatch.planning import Run

SAMPLE_ROWS = 3
MOST_REFUSED = 100_000  # lines of a list for people, of a run in which perhaps every row failed
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("row", pa.int64()),  # number in the file, from 0; null where the whole file is left out
        pa.field("id", pa.string()),
        pa.field("step", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
    ]
)


class StepSummary(BaseModel, frozen=True, extra="forbid"):
    """One step over all rows. `computed` answers went through the model in this run; `reused` were found on
    disk, under their fragment's key or their own.

    Tokens are those of this run. Rates are over the time in which the engine worked for this step, loading left out;
    None when it did not.
    """

    name: str
    answers: int
    computed: int
    reused: int
    faults: dict[str, int]
    labels: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    rows_per_second: float | None
    tokens_per_second: float | None


class Summary(BaseModel, frozen=True, extra="forbid"):
    """What a run did. `seconds` from its plan to its publication.

    `quarantined`: rows or files are listed as failed. `kept_sources` are not of this run, and stay published.
    """

    run: str
    output: str
    rows: int
    faulty_rows: int
    fragments: int
    unusable: tuple[FileFault, ...]
    quarantined: bool
    kept_sources: int
    steps: tuple[StepSummary, ...]
    samples: tuple[dict[str, Any], ...]
    audits: tuple[Audit, ...]
    seconds: float

    @property
    def computed(self) -> int:
        """Answers that went through a model in this run; 0 means that no model was loaded."""
        return sum(step.computed for step in self.steps)


def publish(job: JobConfig, run: Run, outputs: Sequence[OutputReceipt], canaries: Sequence[Audit] = ()) -> Summary:
    """Audit the staged outputs, make them public, and say what happened.

    AuditError, and nothing is published, when rows are missing or more of them failed than the job allows.
    """
    ledger = Ledger(job.data.output)
    before = ledger.manifest()
    outputs = [each if each.unusable is not None else _with_receipts(ledger, each) for each in outputs]
    written = [_named(job, each) for each in outputs if each.unusable is None]
    unusable = [
        *run.plan.unusable,
        *(
            FileFault(source=each.fragment.source, first_row=each.fragment.first_row, reason=each.unusable)
            for each in outputs
            if each.unusable is not None
        ),
    ]
    try:
        audits = audit(job, run, outputs, ledger.published_receipts(), canaries)
    except AuditError as error:
        listed = _refused(ledger, _quarantined(job, ledger, written, unusable))
        raise AuditError(f"{error}{listed}") from error
    samples = _samples(job, ledger, written)
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
    there = tuple(name for name in manifest.replaced if (ledger.root / name).exists())
    manifest = manifest.model_copy(update={"steps": _origins(job, written), "replaced": there})
    stay = {file.source for file in manifest.files} - {output.fragment.source for output in written}
    lines = [*ledger.quarantine(stay), *faults]
    ledger.publish(manifest, written, pa.Table.from_pylist(lines, QUARANTINE_SCHEMA))
    return Summary(
        run=run.id,
        output=job.data.output,
        rows=sum(output.fragment.rows for output in written),
        faulty_rows=sum(output.faulty_rows for output in written),
        fragments=len(written),
        unusable=tuple(unusable),
        quarantined=job.on_error == "quarantine" and bool(faults),
        kept_sources=len(stay),
        steps=tuple(
            _step_summary(step.name, run, [output.answers[index] for output in written])
            for index, step in enumerate(job.steps)
        ),
        samples=tuple(samples),
        audits=audits,
        seconds=time.time() - run.began,
    )


def _refused(ledger: Ledger, faults: Iterator[dict[str, Any]]) -> str:
    """Keep the first of the failed rows of a run that publishes nothing; where they are listed, as a sentence."""
    lines = list(islice(faults, MOST_REFUSED))
    if not lines:
        return ""
    try:
        return f" Each row that failed: {ledger.refuse(pa.Table.from_pylist(lines, QUARANTINE_SCHEMA))}."
    except GlmbatchError as error:  # what the audit found matters more
        return f" They are not listed: {error}"


def _origins(job: JobConfig, written: Sequence[OutputReceipt]) -> dict[str, StepOrigin]:
    models = {receipt.step: receipt.model for output in written[:1] for receipt in output.answers}
    settings = {step.name: answer_settings(step) for step in job.steps}
    return {step: StepOrigin(settings=settings[step], model=model) for step, model in models.items()}


def _with_receipts(ledger: Ledger, output: OutputReceipt) -> OutputReceipt:
    """The output with the receipts of the answers as they lie on disk: a cached output may tell of an older run's."""
    return output.model_copy(update={"answers": tuple(ledger.read_answers(each.key)[0] for each in output.answers)})


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


def _step_summary(name: str, run: Run, receipts: Sequence[AnswersReceipt]) -> StepSummary:
    # Files with the same rows share one receipt, which counts once.
    fresh = {receipt.key: receipt for receipt in receipts if receipt.run == run.id}.values()
    busy = [receipt for receipt in fresh if receipt.computed_rows]
    # Fragments overlap, so the time is from the first start to the last end, not the sum.
    seconds = max((each.began + each.seconds for each in busy), default=0.0) - min(
        (each.began for each in busy), default=0.0
    )
    computed = sum(receipt.computed_rows for receipt in fresh)
    tokens = sum(receipt.prompt_tokens + receipt.completion_tokens for receipt in fresh)
    return StepSummary(
        name=name,
        answers=sum(receipt.rows for receipt in receipts),
        computed=computed,
        reused=sum(
            receipt.known_rows if receipt.run == run.id else receipt.rows - sum(receipt.faults.values())
            for receipt in receipts
        ),
        faults=total(receipt.faults for receipt in receipts),
        labels=total(receipt.labels for receipt in receipts),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in fresh),
        completion_tokens=sum(receipt.completion_tokens for receipt in fresh),
        rows_per_second=computed / seconds if seconds else None,
        tokens_per_second=tokens / seconds if seconds else None,
    )


def _samples(job: JobConfig, ledger: Ledger, written: Sequence[OutputReceipt]) -> list[dict[str, Any]]:
    """A few rows without fault, from the first fragment that has some, with their text and answers."""
    columns = list(dict.fromkeys(column for step in job.steps for column in job.source_columns(step).values()))
    for output in written:
        if output.faulty_rows == output.fragment.rows or not columns:
            continue
        steps = [receipt.step for receipt in output.answers]
        table = read_columns(ledger.output_path(output), [*columns, *steps, *(f"{step}_error" for step in steps)])
        faults = [table.column(f"{step}_error").to_pylist() for step in steps]
        fine = [row for row, reasons in enumerate(zip(*faults, strict=True)) if not any(reasons)][:SAMPLE_ROWS]
        values = {name: prompt_values(table.column(name).take(fine)) for name in (*columns, *steps)}
        return [{name: column[row] for name, column in values.items()} for row in range(len(fine))]
    return []


def _quarantined(
    job: JobConfig, ledger: Ledger, written: Sequence[OutputReceipt], unusable: Sequence[FileFault]
) -> Iterator[dict[str, Any]]:
    """A line for each file left out and for each step of each row that failed."""
    for fault in unusable:
        yield {"source": fault.source, "row": fault.first_row, "error_type": "unusable_file", "error": fault.reason}
    for output in written:
        if not output.faulty_rows:
            continue
        fragment = output.fragment
        columns = [f"{receipt.step}{end}" for receipt in output.answers for end in ("_error", "_error_type")]
        columns += [] if job.data.id_column is None else [job.data.id_column]
        table = read_columns(ledger.output_path(output), columns)
        ids: list[Any] = [None] * fragment.rows
        if job.data.id_column is not None:
            ids = prompt_values(table.column(job.data.id_column))
        for receipt in output.answers:
            reasons, kinds = (table.column(f"{receipt.step}{end}").to_pylist() for end in ("_error", "_error_type"))
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


def describe(summary: Summary) -> str:
    """The summary as text for a person, with what to do next."""
    lines = [
        f"{summary.rows} rows in {summary.fragments} fragments, {summary.seconds:.1f} s -> {summary.output}",
        f"run {summary.run}",
    ]
    for step in summary.steps:
        lines += ["", *_describe_step(step)]
    if not summary.computed:
        lines += ["", "Nothing was new: no inference was executed and no model was loaded."]
    if summary.faulty_rows or summary.unusable:
        lines += ["", f"{summary.faulty_rows} rows failed, files left out: {len(summary.unusable)}"]
        lines += [f"  {fault.reason}" for fault in summary.unusable]
        lines.append(f"  each row with its reason: {location(summary.output) / QUARANTINE}")
    lines += ["", *(f"audit {each}" for each in summary.audits)] if summary.audits else []
    if summary.kept_sources:
        lines += ["", f"{summary.kept_sources} sources that were not in this run stay published."]
    for sample in summary.samples:
        lines += ["", *(f"  {name}: {_short(value)}" for name, value in sample.items())]
    table = is_table(location(summary.output))
    reader = "deltalake.DeltaTable({}).to_pandas()" if table else "pandas.read_parquet({})"
    lines += ["", "Read the answers: " + reader.format(repr(summary.output))]
    return "\n".join(lines)


def _describe_step(step: StepSummary) -> list[str]:
    rates = (
        ""
        if step.rows_per_second is None
        else f", {step.rows_per_second:,.0f} rows/s, {step.tokens_per_second:,.0f} tokens/s"
    )
    repeated = step.answers - step.computed - step.reused - sum(step.faults.values())
    shared = f", {repeated} of repeated texts" if step.computed and repeated > 0 else ""
    lines = [f"{step.name}: {step.answers} answers, {step.computed} computed, {step.reused} reused{shared}{rates}"]
    if step.labels:
        lines.append("  labels: " + ", ".join(f"{label} {count}" for label, count in step.labels.items()))
    if step.completion_tokens:
        lines.append(f"  tokens: {step.prompt_tokens} read, {step.completion_tokens} written")
    if step.faults:
        lines.append("  errors: " + ", ".join(f"{kind} {count}" for kind, count in step.faults.items()))
    return lines


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:99] + "…"
