"""The end of a run: collect its outputs, audit them, publish or refuse, and report either way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from glmbatch.errors import AuditError, BadRow, GlmbatchError, shown
from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.input.unchanged import receipts_of, with_stamps
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest, PublishedFile, StepOrigin, next_manifest
from glmbatch.ledger.publication import publish as make_public
from glmbatch.ledger.quarantine import line_of_file, mended_quarantine, write_refused
from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.ledger.rowkeys import answer_settings
from glmbatch.ledger.staying import Staying, filtered, mixture, staying
from glmbatch.report.counts import Audit, Measured, Proofs
from glmbatch.report.log import log_audits, log_end
from glmbatch.report.measures import Measures, measure
from glmbatch.report.outputs import ReportedStep, read_outputs
from glmbatch.report.report import write_report
from glmbatch.report.summary import Summary, step_summary
from glmbatch.run.audits import (
    audit_steps,
    check_audits,
    check_complete,
    check_errors,
    compares,
    model_reason,
    published_counts,
)
from glmbatch.run.models import model_notes
from glmbatch.run.promotion.kept import kept_in
from glmbatch.run.promotion.rule import check_measured
from glmbatch.run.prompts import prompt_notes
from glmbatch.run.session import session_of
from glmbatch.run.work import Question, Run, basis_of_run, made_with, now
from glmbatch.settings.job import AnyStep, ClassifyStep, DataConfig, JobConfig
from glmbatch.store.files import DIGEST_CHARS

MOST_REFUSED = 100_000  # rows listed for a refused run, in which perhaps every row failed


@dataclass(frozen=True, slots=True)
class Collected:
    """What a run made, and what it will be published beside.

    `outputs` has one receipt per fragment. `written` has those with a staged file, `unusable` the
    files and fragments that are left out. `before` is the current manifest, and `last_run` its run,
    unless that is this one. `staying` has the published files that stay, and `unchanged` those of
    unchanged sources among them; `kept` has a receipt for each step that stands for their answers.
    `measured` says how the steps score on labelled rows, and `audits` what was audited.
    """

    ledger: Ledger
    before: Manifest | None
    last_run: str | None
    outputs: list[OutputReceipt]
    written: list[OutputReceipt]
    unusable: list[FileFault]
    staying: Staying
    unchanged: list[PublishedFile]
    kept: list[AnswersReceipt]
    measured: tuple[Measured, ...]
    audits: tuple[Audit, ...] = ()


@dataclass(frozen=True, slots=True)
class Results:
    """What a run did. `failures` has an entry for each file left out and each row that failed."""

    summary: Summary
    measures: tuple[Measures, ...]
    failures: list[dict[str, Any]]


def publish(
    job: JobConfig,
    run: Run,
    questions: Sequence[Question],
    outputs: Sequence[OutputReceipt],
    proofs: Proofs,
) -> Summary:
    """Audit the staged outputs, publish them, write the report, and return the summary.

    `outputs` are in the order of the plan; none if a measured step did not pass. Safe to repeat
    after a crash. Publishes nothing on AuditError (fragments are missing, more rows failed than the
    job allows, a proof or another audit failed) and BadRow (on_error: raise, when a row failed).
    """
    drop_missing = job.data.missing_sources == "drop"
    collected = _collect(run, outputs, proofs.measured, drop_missing=drop_missing)
    try:
        check_measured(proofs.measured)
        _refuse_mixing(collected, run, questions, drop_missing=drop_missing)
        collected = _review(job.steps, job.max_error_rate, run, collected, proofs.canaries)
        check_audits(collected.audits)
    except AuditError as error:
        _refuse_publishing(job, run, questions, collected, error)
    # Before publication moves the files from where their receipts say.
    results = _measure_run(run, questions, collected, job.data)
    if results.failures and run.context.raises:  # committed under another `on_error`
        first = results.failures[0]
        raise BadRow(
            f"{run.context.output}: nothing published: {first['source']}: row {first.get('row')}, "
            f"step {first.get('step')!r}: {first['error']}. "
            "Fix the row, or set on_error to quarantine."
        )
    basis = basis_of_run(job.data, run.plan.columns, questions)
    kept_sources = _release(run, questions, collected, results.failures, basis)
    summary = results.summary.model_copy(
        update={
            "quarantined": job.on_error == "quarantine"
            and bool(results.failures or results.summary.faulty_rows),
            "kept_sources": kept_sources,
            "renamed_sources": len(collected.staying.renamed),
            "seconds": max(0.0, now() - run.context.began),
        }
    )
    log_end(summary, results.failures)
    return write_report(job, summary, results.measures, collected.last_run)


def _refuse_mixing(
    collected: Collected, run: Run, questions: Sequence[Question], *, drop_missing: bool
) -> None:
    """AuditError when files made with other settings would stay, because their source is damaged.

    `assign` has already refused sources that cannot be read at all. Damage within a file is known
    only now.
    """
    damaged = {fault.source for fault in collected.unusable}
    # A renamed source is listed as damaged under its new name.
    damaged |= {old for old, new in collected.staying.heirs.items() if new in damaged}
    problem = mixture(
        collected.staying.files,
        made_with(questions),
        run.plan,
        damaged,
        drop_missing=drop_missing,
    )
    if problem is not None:
        raise AuditError(problem)


def _refuse_publishing(
    job: JobConfig,
    run: Run,
    questions: Sequence[Question],
    collected: Collected,
    error: AuditError,
) -> NoReturn:
    """Report a run that publishes nothing, and raise an AuditError that says where to look.

    Its cause is an AuditError without paths; `annotate_table` shows that one.
    """
    reason = f"{job.data.output}: nothing published: {error}"
    try:
        results = _measure_run(run, questions, collected, job.data, MOST_REFUSED)
    except GlmbatchError as unread:  # the audit's error matters more
        raise AuditError(f"{reason} Its rows cannot be listed: {unread}") from error
    why = model_reason(results.failures)
    reason += why
    listed = _list_refused(collected, results.failures[:MOST_REFUSED])
    summary = results.summary.model_copy(update={"refused": reason})
    log_end(summary, results.failures)
    summary = write_report(job, summary, results.measures, collected.last_run)
    about = f" Read about the run: {summary.report}." if summary.report else ""
    found = AuditError(f"{error}{why}")
    found.__cause__ = error
    raise AuditError(f"{reason}{listed}{about}") from found


def _review(
    steps: Sequence[AnyStep],
    max_error_rate: float,
    run: Run,
    collected: Collected,
    canaries: Sequence[Audit],
) -> Collected:
    """`collected` with all audits. AuditError when fragments are missing, or many rows failed."""
    check_complete(run.plan, collected.outputs)
    check_errors(run.plan, collected.outputs, max_error_rate, collected.unchanged)
    published: list[AnswersReceipt] = []
    if any(compares(step) for step in steps):
        published = published_counts(collected.ledger, collected.before)
    audits = [*canaries, *audit_steps(steps, collected.outputs, published, collected.kept)]
    log_audits(audits)
    return replace(collected, audits=tuple(audits))


def _collect(
    run: Run,
    outputs: Sequence[OutputReceipt],
    measured: tuple[Measured, ...],
    *,
    drop_missing: bool,
) -> Collected:
    ledger = session_of(run.context).ledger
    current = ledger.newest(outputs, run.context.id)
    written = []
    unusable = list(run.plan.unusable)
    for output in current:
        if output.unusable is None:
            written.append(_with_published_name(run, output))
            continue
        place = {"source": output.fragment.source, "first_row": output.fragment.first_row}
        unusable.append(FileFault(**place, reason=shown(output.unusable)))
    before = ledger.manifest()
    # If this run's own publication was killed and is retried, the manifest may already be its own.
    last_run = before.run if before and before.run != run.context.id else None
    stay = staying(
        before,
        run.plan,
        written=[output.fragment for output in written],
        damaged={fault.source for fault in unusable},
        drop_missing=drop_missing,
    )
    unchanged = [file for file in stay.files if file.source in run.plan.unchanged]
    kept = receipts_of(unchanged)
    return Collected(
        ledger, before, last_run, current, written, unusable, stay, unchanged, kept, measured
    )


def _with_published_name(run: Run, output: OutputReceipt) -> OutputReceipt:
    """The output under its published name, which in a table has the digest: none is used twice."""
    if run.context.format == "parquet":
        return output
    stem = output.fragment.output_name.removesuffix(".parquet")
    name = f"{stem}.{output.digest[:DIGEST_CHARS]}.parquet"
    return output.model_copy(update={"output_name": name})


def _measure_run(
    run: Run,
    questions: Sequence[Question],
    collected: Collected,
    data: DataConfig,
    most_failures: int | None = None,
) -> Results:
    """What the run did, from its receipts and one read of each output file."""
    steps = []
    for question in questions:
        # No report shows a column that does not go out.
        sources = tuple(filter(data.has_out, question.inputs.columns.values()))
        classifies = isinstance(question.step, ClassifyStep)
        number = isinstance(question.step, ClassifyStep) and question.step.number
        steps.append(ReportedStep(question.name, classifies, sources, number))
    written = collected.written
    reading = read_outputs(steps, written, collected.ledger, data.id_column, most_failures)
    return Results(
        summary=_summarize(run, questions, collected, reading.rows),
        measures=measure(steps, run.context.id, written, reading),
        failures=[*map(line_of_file, collected.unusable), *reading.failures],
    )


def _summarize(
    run: Run,
    questions: Sequence[Question],
    collected: Collected,
    samples: Sequence[dict[str, Any]],
) -> Summary:
    """The summary of the run as it is before publication."""
    written = collected.written
    unchanged = collected.unchanged
    steps = []
    for index, question in enumerate(questions):
        receipts = [output.answers[index] for output in written]
        receipts += [receipt for receipt in collected.kept if receipt.step == question.name]
        steps.append(step_summary(question.name, run.context.id, receipts, question.labels))
    faulty_rows = sum(output.faulty_rows for output in written)
    return Summary(
        run=run.context.id,
        output=run.context.output,
        table=run.context.table,
        rows=sum(output.fragment.rows for output in written) + sum(f.rows for f in unchanged),
        faulty_rows=faulty_rows + sum(file.faulty_rows for file in unchanged),
        fragments=len(written) + len(unchanged),
        unusable=tuple(collected.unusable),
        quarantined=False,
        kept_sources=0,
        steps=tuple(steps),
        samples=tuple(samples),
        audits=collected.audits,
        seconds=max(0.0, now() - run.context.began),
        notes=(*model_notes([each.model for each in questions]), *prompt_notes(questions)),
        skipped=run.plan.skipped,
        unchanged_sources=len(run.plan.unchanged),
        rechecked_sources=run.plan.rechecked,
        silently_changed=run.plan.silent,
        filtered=filtered(run.plan, unchanged),
        version=run.plan.version,
        measured=collected.measured,
    )


def _list_refused(collected: Collected, lines: Sequence[dict[str, Any]]) -> str:
    """Write the failed rows of a refused run to a file; return where it is, as a sentence."""
    if not lines:
        return ""
    try:
        path = write_refused(collected.ledger.root, lines)
    except GlmbatchError as error:  # the audit's error matters more
        return f" The failed rows are not listed: {error}"
    return f" The failed rows: {path}."


def _release(
    run: Run,
    questions: Sequence[Question],
    collected: Collected,
    faults: Sequence[dict[str, Any]],
    basis: str,
) -> int:
    """Publish the staged outputs; return how many sources of earlier runs stay published."""
    origins = {}
    # A run that wrote nothing has no answers, and so no origin to record.
    for question in questions if collected.written or collected.unchanged else ():
        settings = answer_settings(question.step)
        origins[question.name] = StepOrigin(settings=settings, model=question.model.identity)
    manifest = next_manifest(
        run.context.id,
        run.plan,
        collected.before,
        written=collected.written,
        stay=collected.staying.files,
        unusable=collected.unusable,
        steps=origins,
        format=run.context.format,
        table=run.context.table,
    )
    ledger = collected.ledger
    read = {fragment.source for fragment in run.plan.fragments}
    # This run's faults replace the listed ones of its own sources; others stay listed.
    told = read | {fault.source for fault in collected.unusable}
    lines = [*mended_quarantine(ledger.root, collected.staying.files, told), *faults]
    written = collected.written
    make_public(
        ledger,
        manifest,
        written,
        lines,
        lambda moved: with_stamps(ledger.folder, moved, written, run.plan, basis),
    )
    kept_in(run.context.output).mark_published(collected.measured)
    tonight = {output.fragment.source for output in collected.written} | run.plan.unchanged.keys()
    return len({file.source for file in collected.staying.files} - tonight)
