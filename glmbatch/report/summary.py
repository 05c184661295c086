"""What a run did, as counts, and as text for a person. Reads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from glmbatch.ledger.delta import is_table
from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.publication import QUARANTINE
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.run.audits import Audit, total
from glmbatch.store.paths import location


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

    @property
    def repeated(self) -> int:
        """Answers of rows whose prompt another row of the run has too."""
        return max(0, self.answers - self.computed - self.reused - sum(self.faults.values()))


class Summary(BaseModel, frozen=True, extra="forbid"):
    """What a run did. `seconds` from its plan to its publication.

    `quarantined`: rows or files are listed as failed. `kept_sources` are not of this run, and stay published.
    `refused` says why nothing was published. `report` is the path of the page about the run.
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
    refused: str | None = None
    report: str | None = None

    @property
    def computed(self) -> int:
        """Answers that went through a model in this run; 0 means that no model was loaded."""
        return sum(step.computed for step in self.steps)


def step_summary(name: str, run: str, receipts: Sequence[AnswersReceipt]) -> StepSummary:
    """One step of `run`, by the receipts of its answers."""
    # Files with the same rows share one receipt, which counts once.
    fresh = {receipt.key: receipt for receipt in receipts if receipt.run == run}.values()
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
            receipt.known_rows
            if receipt.run == run
            else receipt.rows - sum(receipt.faults.values())
            for receipt in receipts
        ),
        faults=total(receipt.faults for receipt in receipts),
        labels=total(receipt.labels for receipt in receipts),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in fresh),
        completion_tokens=sum(receipt.completion_tokens for receipt in fresh),
        rows_per_second=computed / seconds if seconds else None,
        tokens_per_second=tokens / seconds if seconds else None,
    )


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
        lines += ["", *(f"  {name}: {short(value)}" for name, value in sample.items())]
    table = is_table(location(summary.output))
    reader = "deltalake.DeltaTable({}).to_pandas()" if table else "pandas.read_parquet({})"
    lines += ["", "Read the answers: " + reader.format(repr(summary.output))]
    lines += [f"Read about the run: {summary.report}"] if summary.report else []
    return "\n".join(lines)


def _describe_step(step: StepSummary) -> list[str]:
    rates = (
        ""
        if step.rows_per_second is None
        else f", {step.rows_per_second:,.0f} rows/s, {step.tokens_per_second:,.0f} tokens/s"
    )
    shared = f", {step.repeated} of repeated texts" if step.computed and step.repeated else ""
    lines = [
        f"{step.name}: {step.answers} answers, {step.computed} computed, {step.reused} reused{shared}{rates}"
    ]
    if step.labels:
        lines.append(
            "  labels: " + ", ".join(f"{label} {count}" for label, count in step.labels.items())
        )
    if step.completion_tokens:
        lines.append(f"  tokens: {step.prompt_tokens} read, {step.completion_tokens} written")
    if step.faults:
        lines.append(
            "  errors: " + ", ".join(f"{kind} {count}" for kind, count in step.faults.items())
        )
    return lines


def short(value: object, most: int = 100) -> str:
    """`value` on one line of at most `most` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"
