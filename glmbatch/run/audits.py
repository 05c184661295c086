"""The audits that a run must pass before it may replace the published answers.

Uses only counts from the plan and the receipts; reads no rows and no files. The text of each
AuditError completes a sentence that begins with "nothing published:".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmbatch.errors import AuditError
from glmbatch.ledger.fragments import Plan
from glmbatch.ledger.input.unchanged import receipts_of
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest, PublishedFile
from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.report.counts import Audit, population_stability, total, with_unlabelled
from glmbatch.settings.job import AnyStep, ClassifyStep, ExtractStep, GenerateStep

UNREADABLE = "in unreadable files"


def check_complete(plan: Plan, outputs: Sequence[OutputReceipt]) -> None:
    """AuditError unless every planned fragment has its output, in the order of the plan."""
    # The order counts: receipts in another order would be matched with the wrong fragments.
    planned = [fragment.name for fragment in plan.fragments]
    made = [output.fragment.name for output in outputs]
    if made != planned:
        missing = sorted(set(planned) - set(made))
        raise AuditError(f"fragments without output: {missing[:5]}.")


def check_errors(  # noqa: PLR0913 - what is known of the rows of a run, or of a plan
    plan: Plan,
    outputs: Sequence[OutputReceipt],
    max_error_rate: float,
    unchanged: Sequence[PublishedFile] = (),
    *,
    faulty_rows: int = 0,
    faults: Mapping[str, int] | None = None,
) -> None:
    """AuditError when the share of failed rows is above `max_error_rate`.

    Rows of unreadable files count as failed, by estimate if their number is unknown. `unchanged`
    are the files of unchanged sources, whose rows count too. Before there are `outputs`, so many
    `faulty_rows` are known to fail, for the reasons in `faults`.
    """
    unchanged_rows = sum(file.rows for file in unchanged)
    out_of_reach = _rows_out_of_reach(plan, unchanged_rows)
    rows = plan.rows + unchanged_rows + out_of_reach
    failed = out_of_reach + faulty_rows + sum(file.faulty_rows for file in unchanged)
    for output in outputs:
        failed += output.faulty_rows if output.unusable is None else output.fragment.rows
    # Divided, not multiplied: in floating point 0.29 times 100 is less than 29.
    if rows and failed / rows > max_error_rate:
        known = Counter(faults or {})
        reasons = _most_frequent(outputs, receipts_of(unchanged), out_of_reach, known)
        # The number of rows is unknown if a footer cannot be read.
        estimated = "some " if any(fault.rows is None for fault in plan.unusable) else ""
        some = f"{failed} of {estimated}{rows} rows failed ({failed / rows:.1%})"
        raise AuditError(
            f"{f'all {rows} rows failed' if failed == rows else some}, max_error_rate allows "
            f"{max_error_rate:.1%}: {reasons}. "
            "Answers are kept: fix the input or raise max_error_rate, and run again."
        )


def _rows_out_of_reach(plan: Plan, unchanged_rows: int) -> int:
    """The number of rows in files that cannot be used.

    Exact if the file's footer was read. Otherwise estimated from the file's size, or as the mean of
    the readable files if the size is unknown. At least one per file, so that each counts. 0 if the
    plan reached its limit, perhaps before those files.
    """
    if plan.limit is not None and plan.rows >= plan.limit:
        return 0
    # By source, because each fragment's stamp holds the size of the whole file.
    sizes = {fragment.source: fragment.stamp[0] for fragment in plan.fragments}
    for source, stamp in plan.unchanged.items():
        sizes[source] = stamp[0] if stamp else 0
    rows = plan.rows + unchanged_rows
    rows_per_byte = rows / max(1, sum(sizes.values()))
    rows_per_file = rows / max(1, len(sizes))
    lost = 0
    for fault in plan.unusable:
        estimate = fault.size_bytes * rows_per_byte if fault.size_bytes else rows_per_file
        lost += max(1, round(estimate)) if fault.rows is None else fault.rows
    return lost


def _most_frequent(
    outputs: Sequence[OutputReceipt],
    unchanged: Sequence[AnswersReceipt],
    out_of_reach: int,
    known: Counter[str],
) -> str:
    """The three most frequent reasons with their numbers of rows, as text."""
    faults = known + Counter({UNREADABLE: out_of_reach})
    for output in outputs:
        if output.unusable is not None:
            faults[UNREADABLE] += output.fragment.rows
        for receipt in output.answers:
            faults.update(receipt.faults)
    for receipt in unchanged:
        faults.update(receipt.faults)
    # These rows are already counted under the earlier step's reason.
    del faults["earlier_step_failed"]
    return ", ".join(f"{count} {kind}" for kind, count in faults.most_common(3) if count)


def model_reason(failures: Sequence[dict[str, Any]]) -> str:
    """The model's most frequent failure as a sentence, if the model failed on most failed rows."""
    reasons = Counter(line["error"] for line in failures if line["error_type"] == "model_failed")
    if 2 * reasons.total() <= len(failures):
        return ""
    return f" The model failed: {reasons.most_common(1)[0][0]}."


def published_counts(ledger: Ledger, manifest: Manifest | None) -> list[AnswersReceipt]:
    """The receipts of all published answers, or one for each step that stands for them."""
    files = manifest.files if manifest is not None else ()
    if all(file.counts for file in files):
        return receipts_of(files)
    return list(ledger.published_receipts())  # from the footers, which earlier versions need


def check_audits(audits: Sequence[Audit]) -> None:
    """AuditError that names the failed audits, if there are any."""
    failed = [str(audit) for audit in audits if not audit.passed]
    if failed:
        raise AuditError(
            f"{'; '.join(failed)}. Answers are kept: look at them in _glmbatch/answers, fix the "
            "cause or change the limit (a step's audits, or canary.max_change). Run again."
        )


def compares(step: AnyStep) -> bool:
    """Whether an audit of `step` compares its answers with the published ones."""
    if isinstance(step, ClassifyStep):
        return step.audits.max_label_drift is not None
    return step.audits.max_length_drift is not None


def audit_steps(
    steps: Sequence[AnyStep],
    outputs: Sequence[OutputReceipt],
    published: Sequence[AnswersReceipt],
    unchanged: Sequence[AnswersReceipt] = (),
) -> list[Audit]:
    """The audits that the steps set, measured over the answers in `outputs`, in step order.

    The answers of `unchanged` sources count too. `published` are the receipts of the currently
    published answers. Drift is not audited for a step that has none there.
    """
    audits: list[Audit] = []
    # A fragment that could not be read has no answers. `check_errors` counts its rows.
    readable = [output for output in outputs if output.unusable is None]
    for index, step in enumerate(steps):
        now = [output.answers[index] for output in readable]
        now += [receipt for receipt in unchanged if receipt.step == step.name]
        before = [receipt for receipt in published if receipt.step == step.name]
        audits += _abstained_audits(step, now)
        if isinstance(step, ClassifyStep):
            audits += _label_audits(step, now, before)
        else:
            audits += _text_audits(step, now, before)
    return audits


def _abstained_audits(step: AnyStep, now: Sequence[AnswersReceipt]) -> Iterator[Audit]:
    allowed = step.audits.max_abstained_rate
    answered = 0
    for receipt in now:
        answered += receipt.rows - receipt.not_asked - sum(receipt.faults.values())
    if allowed is not None and answered:
        share = sum(receipt.abstained for receipt in now) / answered
        yield Audit(step=step.name, what="share of rows abstained", measured=share, allowed=allowed)


def _label_audits(
    step: ClassifyStep, now: Sequence[AnswersReceipt], before: Sequence[AnswersReceipt]
) -> Iterator[Audit]:
    allowed = step.audits.max_label_drift
    # Only these give answers without a label, which earlier versions did not count.
    counted = not step.multiple or all(x.unlabelled is not None for x in (*now, *before))
    labels = _labels(now, counted=counted)
    labels_before = _labels(before, counted=counted)
    # The first run has no published answers to compare with.
    if allowed is not None and labels and labels_before:
        drift = population_stability(labels_before, labels)
        yield Audit(step=step.name, what="label drift", measured=drift, allowed=allowed)


def _labels(receipts: Sequence[AnswersReceipt], *, counted: bool) -> dict[str, int]:
    """The rows of each label and, where they are `counted`, those that were given none."""
    labels = total(receipt.labels for receipt in receipts)
    without = sum(receipt.abstained + (receipt.unlabelled or 0) for receipt in receipts)
    return with_unlabelled(labels, without if counted else 0)


def _text_audits(
    step: GenerateStep | ExtractStep,
    now: Sequence[AnswersReceipt],
    before: Sequence[AnswersReceipt],
) -> Iterator[Audit]:
    limits = step.audits
    # Over all answers of the output, whichever run computed them, because all are published.
    reasons = total(receipt.finish_reasons for receipt in now)
    empty = sum(receipt.empty_answers for receipt in now)
    answers = sum(reasons.values())
    shares = (
        ("share of truncated answers", reasons.get("length", 0), limits.max_truncated_rate),
        ("share of empty answers", empty, limits.max_empty_rate),
    )
    for what, count, allowed in shares:
        if allowed is not None and answers:
            yield Audit(step=step.name, what=what, measured=count / answers, allowed=allowed)
    allowed = limits.max_length_drift
    length = _mean_length(now)
    length_before = _mean_length(before)
    # Answers that are all empty have a length of 0, and nothing is a share of that.
    if allowed is not None and length is not None and length_before:
        drift = abs(length / length_before - 1)
        yield Audit(
            step=step.name, what="drift of the mean length", measured=drift, allowed=allowed
        )


def _mean_length(receipts: Sequence[AnswersReceipt]) -> float | None:
    """The mean number of tokens per answer; None without answers.

    Receipts of earlier versions lack the lengths of their answers and are left out.
    """
    answers = tokens = 0
    for receipt in receipts:
        count = sum(receipt.finish_reasons.values())
        # Without tokens, answers are empty, or their lengths are not known.
        if receipt.answer_tokens or receipt.empty_answers == count:
            answers += count
            tokens += receipt.answer_tokens
    return tokens / answers if answers else None
