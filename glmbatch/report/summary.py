"""What a run did, as counts. Reads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report.counts import Audit, busy_seconds, total
from glmbatch.store.inputs.find import Skipped


class StepSummary(BaseModel, frozen=True, extra="forbid"):
    """One step over all rows.

    `computed` answers went through the model in this run; `reused` were found on disk, under their
    fragment's key or their own. Tokens are those of this run. Rates are over the seconds in which
    the engine worked for this step, without loading; None when it did not.
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
    def failed(self) -> int:
        """Rows without an answer."""
        return sum(self.faults.values())

    @property
    def repeated(self) -> int:
        """Answers of rows whose prompt another row of the run has too."""
        return max(0, self.answers - self.computed - self.reused - self.failed)


class Summary(BaseModel, frozen=True, extra="forbid"):
    """What a run did, in `seconds` from its plan to its publication.

    `quarantined`: rows or files are listed as failed. `kept_sources` are not of this run, and stay
    published; `renamed_sources` had other names when they were published last. `refused` says why
    nothing was published. `report` is the path of the run's page, `notes` are what is odd about the
    checkpoints. `skipped` are names below the input that it does not stand for.
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

    @property
    def computed(self) -> int:
        """Answers that went through a model in this run; 0 means that no model was loaded."""
        return sum(step.computed for step in self.steps)


def step_summary(name: str, run: str, receipts: Sequence[AnswersReceipt]) -> StepSummary:
    """One step of `run`, by the receipts of its answers."""
    # Files with the same rows share one receipt, whose work counts once.
    by_key = {receipt.key: receipt for receipt in receipts if receipt.run == run}
    own = list(by_key.values())
    seconds = busy_seconds(own)  # 0.0 where all was known, which has no rate
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
        labels=total(receipt.labels for receipt in receipts),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        rows_per_second=computed / seconds if seconds else None,
        tokens_per_second=tokens / seconds if seconds else None,
    )


def _reused(receipt: AnswersReceipt, run: str) -> int:
    """Answers that `run` did not compute: all of an earlier run's receipt, some of its own."""
    if receipt.run == run:
        return receipt.known_rows
    # Its failures are no answers, and are counted apart.
    return receipt.rows - sum(receipt.faults.values())


def short(value: object, most: int = 100) -> str:
    """`value` on one line of at most `most` characters."""
    # No more words than can be shown: a cell of 50 MB has millions.
    text = " ".join(str(value).split(None, most)[:most])
    return text if len(text) <= most else text[: most - 1] + "…"
