"""The facts of one run. The text, the HTML page and the Markdown only arrange them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from glmbatch.errors import counted
from glmbatch.report.counts import population_stability, with_unlabelled
from glmbatch.report.measures import Measures
from glmbatch.report.summary import StepSummary, Summary
from glmbatch.store.objects.requests import Requests


class Verdict(BaseModel, frozen=True, extra="forbid"):
    """Whether to trust a run, in three lines; `changed` if something stands out."""

    lines: tuple[str, ...]
    changed: bool


class Report(BaseModel, frozen=True, extra="forbid"):
    """Everything recorded about one run.

    `device` is None if no model was used. `before` is the run that was published when this one
    began; `labels_before` has its label counts by step, `labelled_before` its rows with a label,
    and `without_label_before` those that were asked and have none. `ended` is in seconds since
    1970, or 0 in reports of earlier versions; they have no `verdict`.
    """

    input: str
    summary: Summary
    measures: tuple[Measures, ...]
    models: dict[str, str]
    device: str | None
    price_per_hour: float | None
    price_per_1000_writes: float | None = None
    price_per_1000_reads: float | None = None
    before: str | None = None
    labels_before: dict[str, dict[str, int]] = {}
    labelled_before: dict[str, int] = {}
    without_label_before: dict[str, int] = {}
    ended: float = 0.0
    verdict: Verdict | None = None

    @property
    def cost(self) -> float | None:
        """Cost of the whole time from plan to publication, waiting included; None without a price.

        In the currency of `price_per_hour`.
        """
        if self.price_per_hour is None:
            return None
        return self.summary.seconds / 3600 * self.price_per_hour

    @property
    def requests_cost(self) -> float | None:
        """Cost of the requests to object stores; None without both their prices."""
        requests = self.summary.requests
        writes, reads = self.price_per_1000_writes, self.price_per_1000_reads
        if requests is None or writes is None or reads is None:
            return None
        return (requests.writes * writes + requests.reads * reads) / 1000


@dataclass(frozen=True, slots=True)
class LabelShare:
    """A label's rows and its share of the labelled rows, in a run and in the previous one."""

    label: str
    rows: int
    share: float
    rows_before: int
    share_before: float


def outcome(summary: Summary) -> str:
    """Whether the run was published and, if not, why."""
    return f"Refused: {summary.refused}" if summary.refused else "Published."


def size(summary: Summary) -> str:
    """The numbers of rows and fragments in the run, as text."""
    return f"{counted(summary.rows, 'row')} in {counted(summary.fragments, 'fragment')}"


def unchanged(summary: Summary) -> str:
    """How many sources were left alone, and how many of them were digested again, as text."""
    return f"{summary.unchanged_sources:,} ({summary.rechecked_sources:,} digested again)"


def run_facts(report: Report) -> list[tuple[str, str]]:
    """The main facts of the run, as pairs of name and value."""
    summary = report.summary
    sums: Counter[str] = Counter()
    for step in summary.steps:
        sums.update(answers=step.answers, read=step.prompt_tokens, written=step.completion_tokens)
        sums.update(computed=step.computed, reused=step.reused, repeated=step.repeated)
    sources = f"{sums['computed']:,}, {sums['reused']:,}, {sums['repeated']:,}"
    lines = [
        ("run", summary.run),
        ("output", summary.output),
        ("size", size(summary)),
        ("failed rows", f"{summary.faulty_rows:,}"),
        ("files left out", f"{len(summary.unusable):,}"),
        ("unchanged sources", unchanged(summary)),
        ("changed silently", ", ".join(summary.silently_changed[:5]) or "0"),
        ("sources kept, renamed", f"{summary.kept_sources:,}, {summary.renamed_sources:,}"),
        ("not read", ", ".join(map(str, summary.skipped)) or "0"),
        *([("input", str(summary.version))] if summary.version else []),
        *([("where", str(summary.filtered))] if summary.filtered else []),
        ("answers", f"{sums['answers']:,}"),
        ("computed, reused, repeated", sources),
        ("tokens", tokens(sums["read"], sums["written"])),
        ("time", f"{summary.seconds:.1f} s"),
        ("device", report.device or "none (no model was used)"),
    ]
    for name, path in report.models.items():
        lines.append((f"model for {name}", path))
    lines += [("measured", str(each)) for each in summary.measured]
    lines += [("note", note) for note in summary.notes]
    if report.cost is not None:
        lines.append(("cost", f"{report.cost:.4g} at {report.price_per_hour:g} per hour"))
    if summary.requests is not None:
        lines.append(("object store", store_requests(summary.requests)))
    if report.requests_cost is not None:
        prices = f"{report.price_per_1000_writes:g} and {report.price_per_1000_reads:g}"
        lines.append(("cost of requests", f"{report.requests_cost:.4g} at {prices} per 1,000"))
    return lines


def store_requests(requests: Requests) -> str:
    """The requests to object stores by what they cost, and the bytes of objects, as text."""
    megabytes = [number / 1e6 for number in (requests.bytes_read, requests.bytes_written)]
    return (
        f"{requests.writes:,} writes (put {requests.puts:,}, copy {requests.copies:,}, list "
        f"{requests.lists:,}), {requests.reads:,} reads (get {requests.gets:,}, head "
        f"{requests.heads:,}), {counted(requests.deletes, 'delete')}, {megabytes[0]:,.1f} MB read, "
        f"{megabytes[1]:,.1f} MB written"
    )


def answers(step: StepSummary) -> str:
    """Where a step's answers came from and how fast the model was, as text."""
    parts = [
        counted(step.answers, "row"),
        f"{step.computed:,} computed",
        f"{step.reused:,} reused",
    ]
    # Leave out what most runs do not have.
    if step.repeated:
        parts.append(f"{step.repeated:,} repeated")
    if step.failed:
        parts.append(f"{step.failed:,} failed")
    if step.not_asked:
        parts.append(f"{step.not_asked:,} not asked")
    if step.abstained:
        parts.append(f"{step.abstained:,} abstained")
    if step.unlabelled:
        parts.append(f"{step.unlabelled:,} without a label")
    if step.rows_per_second is not None:
        parts.append(f"{_rate(step.rows_per_second)} rows/s")
    if step.tokens_per_second is not None:
        parts.append(f"{_rate(step.tokens_per_second)} tokens/s")
    return ", ".join(parts)


def _rate(per_second: float) -> str:
    # A 6B model on a CPU answers less than one row per second, which must not be shown as 0.
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def tokens(read: int, written: int) -> str:
    """Numbers of prompt tokens and generated tokens, as text."""
    return f"{read:,} read, {written:,} generated"


def by_count(counts: Mapping[str, int]) -> str:
    """Names with their counts, on one line."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def errors_by_reason(summary: Summary) -> list[tuple[str, str, int]]:
    """Step, reason and number of failed rows; then the number of files left out."""
    lines = []
    for step in summary.steps:
        for reason, rows in step.faults.items():
            lines.append((step.name, reason, rows))
    if summary.unusable:
        lines.append(("files left out", "unusable_file", len(summary.unusable)))
    return lines


def label_shares(report: Report, step: StepSummary) -> list[LabelShare]:
    """Each label of `step` in this run or the previous one, most frequent first."""
    # Keep labels that no longer occur: those matter most.
    before = report.labels_before.get(step.name, {})
    labels = dict.fromkeys([*step.labels, *before])
    # At least 1, so that a step without labels in one of the runs has a share of 0 there.
    labelled = max(1, step.labelled)
    # Reports of earlier versions lack it, and the sum is the same unless rows have several labels.
    labelled_before = max(1, report.labelled_before.get(step.name, sum(before.values())))
    shares = []
    for label in labels:
        rows = step.labels.get(label, 0)
        rows_before = before.get(label, 0)
        share_before = rows_before / labelled_before
        shares.append(LabelShare(label, rows, rows / labelled, rows_before, share_before))
    return shares


def label_drift(report: Report, step: StepSummary) -> str:
    """How far the label shares of `step` moved since the previous run, as a sentence."""
    labels_before = report.labels_before.get(step.name, {})
    before = with_unlabelled(labels_before, report.without_label_before.get(step.name, 0))
    if not before:
        return "No comparison: no earlier run of this step was published, or its report is gone."
    drift = population_stability(before, with_unlabelled(step.labels, step.without_label))
    return (
        f"Label shift since the previous run, {report.before}: {drift:.4f} (population stability "
        "index; 0.1 is a small shift, 0.25 a large one)."
    )
