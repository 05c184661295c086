"""What stands between answers and their publication: nothing that is not fit replaces what is.

Counts alone, from receipts; no rows, no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import log

from pydantic import BaseModel

from glmbatch.errors import AuditError
from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.run.work import Run
from glmbatch.settings.job import AnyStep, ClassifyStep, JobConfig


class Audit(BaseModel, frozen=True, extra="forbid"):
    """One check that was asked for: what was measured, and the most that the job allows. `seen`: cases, for people."""

    step: str
    what: str
    measured: float
    allowed: float
    seen: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.measured <= self.allowed

    def __str__(self) -> str:
        seen = f" ({'; '.join(self.seen)})" if self.seen else ""
        return f"{self.step}: {self.what} {self.measured:.3g}, at most {self.allowed:.3g} allowed{seen}"


def audit(
    job: JobConfig,
    run: Run,
    outputs: Sequence[OutputReceipt],
    before: Iterable[AnswersReceipt],
    canaries: Sequence[Audit] = (),
) -> tuple[Audit, ...]:
    """The audits that the steps ask for and the `canaries`, all passed; `before` are the receipts of what is published.

    AuditError, and nothing may be published, when rows are missing, when more of them failed than the job allows, or
    when an audit fails.
    """
    _account(job, run, outputs)
    _count_errors(job, run, outputs)
    audits = list(canaries)
    drifts = any(_compares(step) for step in job.steps)
    published = list(before) if drifts else []  # from the footers of all files
    for index, step in enumerate(job.steps):
        tonight = [output.answers[index] for output in outputs if output.unusable is None]
        audits += _step_audits(
            step, tonight, [receipt for receipt in published if receipt.step == step.name]
        )
    failed = [f"{each}" for each in audits if not each.passed]
    if failed:
        raise AuditError(
            f"{job.data.output}: nothing published: {'; '.join(failed)}. Answers are kept: look at them in "
            "_glmbatch/answers, mend the cause or change the limit (a step's audits, or canary.max_change). Run again."
        )
    return tuple(audits)


def _compares(step: AnyStep) -> bool:
    """Whether an audit of `step` compares its answers with those published."""
    if isinstance(step, ClassifyStep):
        return step.audits.max_label_drift is not None
    return step.audits.max_length_drift is not None


def _account(job: JobConfig, run: Run, outputs: Sequence[OutputReceipt]) -> None:
    planned = [fragment.name for fragment in run.plan.fragments]
    seen = [output.fragment.name for output in outputs]
    if seen != planned:
        missing = sorted(set(planned) - set(seen))
        raise AuditError(
            f"{job.data.output}: nothing published: fragments without output: {missing[:5]}."
        )


def _count_errors(job: JobConfig, run: Run, outputs: Sequence[OutputReceipt]) -> None:
    lost = sum(
        output.fragment.rows for output in outputs if output.unusable is not None
    ) + _rows_out_of_reach(run)
    failed = lost + sum(output.faulty_rows for output in outputs if output.unusable is None)
    rows = run.plan.rows + _rows_out_of_reach(run)
    if run.plan.unusable and not run.plan.rows and run.plan.limit is None:
        raise AuditError(
            f"{job.data.output}: nothing published: no row, and {len(run.plan.unusable)} unreadable files."
        )
    if rows and failed == rows:
        raise AuditError(
            f"{job.data.output}: nothing published: all {rows} rows failed: {_most_frequent(run, outputs)}."
        )
    if failed > job.max_error_rate * rows:
        raise AuditError(
            f"{job.data.output}: nothing published: {failed} of {rows} rows failed ({failed / rows:.1%}), "
            f"max_error_rate allows {job.max_error_rate:.1%}: {_most_frequent(run, outputs)}. "
            "Answers are kept: mend the input or raise max_error_rate, and run again."
        )


def _rows_out_of_reach(run: Run) -> int:
    """Rows of the files that cannot be read, as many as their size suggests: their footers cannot be asked.

    None in a limited run, which may never have come to them.
    """
    if run.plan.limit is not None:
        return 0
    sizes = {fragment.source: fragment.stamp[0] for fragment in run.plan.fragments}
    lost_bytes = sum(fault.size_bytes for fault in run.plan.unusable)
    return round(lost_bytes * run.plan.rows / sum(sizes.values())) if sum(sizes.values()) else 0


def _most_frequent(run: Run, outputs: Sequence[OutputReceipt]) -> str:
    faults: Counter[str] = Counter({"in unreadable files": _rows_out_of_reach(run)})
    for output in outputs:
        if output.unusable is not None:
            faults["in unreadable files"] += output.fragment.rows
        for answers in output.answers:
            faults.update(
                {
                    kind: count
                    for kind, count in answers.faults.items()
                    if kind != "earlier_step_failed"
                }
            )
    return ", ".join(f"{count} {kind}" for kind, count in faults.most_common(3) if count)


def _step_audits(
    step: AnyStep, tonight: Sequence[AnswersReceipt], before: Sequence[AnswersReceipt]
) -> Iterable[Audit]:
    if isinstance(step, ClassifyStep):
        now, then = (
            total(receipt.labels for receipt in receipts) for receipts in (tonight, before)
        )
        if step.audits.max_label_drift is not None and now and then:
            drift = population_stability(then, now)
            yield Audit(
                step=step.name,
                what="label drift",
                measured=drift,
                allowed=step.audits.max_label_drift,
            )
        return
    reasons = total(receipt.finish_reasons for receipt in tonight)
    written = sum(reasons.values())
    shares = (
        ("share of truncated answers", reasons.get("length", 0), step.audits.max_truncated_rate),
        (
            "share of empty answers",
            sum(receipt.empty_answers for receipt in tonight),
            step.audits.max_empty_rate,
        ),
    )
    for what, count, allowed in shares:
        if allowed is not None and written:
            yield Audit(step=step.name, what=what, measured=count / written, allowed=allowed)
    length, length_before = _mean_length(tonight), _mean_length(before)
    if step.audits.max_length_drift is not None and length and length_before:
        moved = abs(length / length_before - 1)
        yield Audit(
            step=step.name,
            what="drift of the mean length",
            measured=moved,
            allowed=step.audits.max_length_drift,
        )


def _mean_length(receipts: Sequence[AnswersReceipt]) -> float:
    """Tokens of an answer; 0 where there are none, or where their lengths were not kept."""
    known = [receipt for receipt in receipts if receipt.answer_tokens]
    answers = sum(sum(receipt.finish_reasons.values()) for receipt in known)
    return sum(receipt.answer_tokens for receipt in known) / answers if answers else 0.0


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums by name, largest first."""
    sums: Counter[str] = Counter()
    for each in counts:
        sums.update(each)
    return dict(sums.most_common())


def population_stability(before: Mapping[str, int], now: Mapping[str, int]) -> float:
    """The population stability index of two counts of labels: 0 for equal shares, 0.25 for a large shift.

    Half a row is added to each label, so that one that nobody chose has a share too.
    """
    labels = before.keys() | now.keys()

    def share(counts: Mapping[str, int], label: str) -> float:
        return (counts.get(label, 0) + 0.5) / (sum(counts.values()) + 0.5 * len(labels))

    pairs = [(share(before, label), share(now, label)) for label in labels]
    return sum((new - old) * log(new / old) for old, new in pairs)
