"""The counts of what a run did. Reads no files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.ledger.staying import Filtered
from glmbatch.report.counts import Audit, Measured, busy_seconds, total
from glmbatch.store.inputs.found import Skipped, Version
from glmbatch.store.objects.requests import Requests


class StepSummary(BaseModel, frozen=True, extra="forbid"):
    """The counts of one step over all rows.

    `computed` answers are from the model in this run; `reused` ones were found on disk, by fragment
    or by row key. Tokens are those of this run. Rates cover the time in which the engine worked for
    this step, without loading; they are None if it did not.
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
    not_asked: int = 0
    abstained: int = 0
    unlabelled: int = 0

    @property
    def failed(self) -> int:
        """Number of rows without an answer, except those not asked and those abstained from."""
        return sum(self.faults.values())

    @property
    def labelled(self) -> int:
        """Number of rows with a label, or with several; 0 for a step without labels."""
        if not self.labels:
            return 0
        return self.answers - self.failed - self.not_asked - self.without_label

    @property
    def without_label(self) -> int:
        """Number of rows that were asked and have no label, without a failure."""
        return self.abstained + self.unlabelled

    @property
    def repeated(self) -> int:
        """Number of answers copied from another row of the fragment with the same prompt."""
        without = self.failed + self.not_asked
        return max(0, self.answers - self.computed - self.reused - without)


class Summary(BaseModel, frozen=True, extra="forbid"):
    """What a run did.

    quarantined      whether rows or files failed and `on_error` is quarantine
    kept_sources     sources that are not in this run and stay published
    renamed_sources  sources that were published under another name before
    refused          why nothing was published; None if the run was published
    report           path of the run's page
    notes            remarks on the checkpoints and the prompts
    skipped          names inside the input that are not part of it
    seconds          from plan to publication
    unchanged_sources  sources that were neither read nor asked about; their rows count as reused
    rechecked_sources  those of them that were digested again all the same
    silently_changed   sources that had other bytes under the same size and times
    filtered           what the condition on rows left out; None without one
    version            the version of the table that was read; None for other inputs
    measured           how the steps score on labelled rows
    requests           to object stores, until the report was written; None if there were none
    table              the name of the Iceberg table over the output; empty if there is none
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
    renamed_sources: int = 0
    refused: str | None = None
    report: str | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    unchanged_sources: int = 0
    rechecked_sources: int = 0
    silently_changed: tuple[str, ...] = ()
    filtered: Filtered | None = None
    version: Version | None = None
    measured: tuple[Measured, ...] = ()
    requests: Requests | None = None
    table: str = ""

    @property
    def computed(self) -> int:
        """Number of answers that models computed in this run; 0 if no model was loaded."""
        measured = sum(each.prompts for each in self.measured)
        return measured + sum(step.computed for step in self.steps)


def step_summary(
    name: str, run: str, receipts: Sequence[AnswersReceipt], labels: Sequence[str] = ()
) -> StepSummary:
    """The summary of one step of `run`, from the receipts of its answers.

    Those of `labels` that no row has count 0.
    """
    # Fragments of a bundle with the same rows share one receipt; its work counts once.
    by_key = {(part.file_key, part.key): part for part in receipts if part.run == run}
    own = list(by_key.values())
    seconds = busy_seconds(own)  # 0.0 if all answers were known; then there is no rate
    computed = sum(receipt.computed_rows for receipt in own)
    prompt_tokens = sum(receipt.prompt_tokens for receipt in own)
    completion_tokens = sum(receipt.completion_tokens for receipt in own)
    tokens = prompt_tokens + completion_tokens
    return StepSummary(
        name=name,
        answers=sum(receipt.rows for receipt in receipts),
        computed=computed,
        reused=sum(_reused(receipt, run) for receipt in receipts),
        faults=total(receipt.faults for receipt in receipts),
        labels=total([*(receipt.labels for receipt in receipts), dict.fromkeys(labels, 0)]),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        rows_per_second=computed / seconds if seconds else None,
        tokens_per_second=tokens / seconds if seconds else None,
        not_asked=sum(receipt.not_asked for receipt in receipts),
        abstained=sum(receipt.abstained for receipt in receipts),
        unlabelled=sum(receipt.unlabelled or 0 for receipt in receipts),
    )


def _reused(receipt: AnswersReceipt, run: str) -> int:
    """Answers that `run` reused: all in an earlier run's receipt, the known ones in its own."""
    if receipt.run == run:
        return receipt.known_rows
    # Rows without an answer are counted separately.
    return receipt.rows - sum(receipt.faults.values()) - receipt.not_asked


def short(value: object, most: int = 100) -> str:
    """`value` on one line of at most `most` characters."""
    # Split no more words than can be shown; a cell of 50 MB has millions.
    has_parts = isinstance(value, dict | list)  # of a struct or a list, which are read as JSON
    shown = json.dumps(value, ensure_ascii=False, default=str) if has_parts else str(value)
    text = " ".join(shown.split(None, most)[:most])
    return text if len(text) <= most else text[: most - 1] + "…"
