"""Sums, times and drift computed from receipts. Opens no file and knows no job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import log

from pydantic import BaseModel

from glmbatch.errors import counted
from glmbatch.ledger.receipts import AnswersReceipt

NO_LABEL = ""  # no label of a step is empty
# The time that a run of fewer rows takes is mostly that of its start.
RATED_ROWS = 50
NEW = "not published before"  # the change of a step that has no published answers


class Audit(BaseModel, frozen=True, extra="forbid"):
    """The result of one audit: the measured value and the highest value allowed.

    `seen` lists a few of the cases behind the number, for people.
    """

    step: str
    what: str
    measured: float
    allowed: float
    seen: tuple[str, ...] = ()  # stored reports contain this name

    @property
    def passed(self) -> bool:
        """Whether the measured value is within the limit."""
        return self.measured <= self.allowed

    def __str__(self) -> str:
        line = f"{self.step}: {self.what} {self.measured:.3g}, at most {self.allowed:.3g} allowed"
        return f"{line} ({'; '.join(self.seen)})" if self.seen else line


class Measured(BaseModel, frozen=True, extra="forbid"):
    """How one step scores on labelled rows, from 0 to 1.

    `change` says how it differs from the published step; None if it does not. `before` is the score
    of the published step over the `paired` rows that both have, and `gain` the present one less
    that; None if the published step was not measured. `worse` and `better` are numbers of texts;
    `p` says how often chance alone makes such a loss. `kept` is the key of the measurement.
    The model was asked `prompts` for it in this run, of so many `tokens` with their answers;
    `refused` says why the step must not be published. Its checkpoint was trained on `learned` of
    the rows.
    """

    step: str
    rows: int
    score: float
    change: str | None
    kept: str
    prompts: int = 0
    tokens: int = 0
    paired: int = 0
    before: float | None = None
    gain: float | None = None
    worse: int = 0
    better: int = 0
    p: float | None = None
    learned: int = 0
    refused: str | None = None

    def __str__(self) -> str:
        line = self._line()
        return f"{line}; {learned_of(self.learned, self.rows)}" if self.learned else line

    def _line(self) -> str:
        line = f"{self.step} scores {self.score:.4f} on {counted(self.rows, 'labelled row')}"
        if not self.rows:
            line = f"{self.step} was asked about no labelled row"
        if self.change is None:
            return f"{line}, unchanged"
        line = f"{line} ({self.change})"
        if self.gain is None or self.before is None or self.p is None:
            is_new = self.change == NEW
            return line if is_new else f"{line}; what is published was not measured on such rows"
        published = f"what is published scores {self.before:.4f}"
        if self.paired != self.rows:
            now = self.before + self.gain
            published += f" on the {counted(self.paired, 'row')} that both have, and this {now:.4f}"
        return (
            f"{line}; {published}: {100 * self.gain:+.1f} points, "
            f"{counted(self.worse, 'text')} worse, {self.better:,} better, p {self.p:.2g}"
        )


def learned_of(learned: int, rows: int) -> str:
    """The warning that a checkpoint was trained on so many of the rows that it is scored on."""
    return (
        f"{learned:,} of {counted(rows, 'row')} are among those the checkpoint was trained on: "
        "the numbers are too good"
    )


class Proofs(BaseModel, frozen=True, extra="forbid"):
    """What speaks for a run besides its own answers: its canaries, and what was measured."""

    canaries: tuple[Audit, ...] = ()
    measured: tuple[Measured, ...] = ()


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of each name's counts, largest first."""
    sums: Counter[str] = Counter()
    for count in counts:
        sums.update(count)
    return dict(sums.most_common())


def busy_seconds(receipts: Iterable[AnswersReceipt]) -> float:
    """Seconds in which the model worked on `receipts`; 0.0 if it computed nothing.

    Fragments overlap, so this is the time from the first start to the last end, not a sum.
    """
    # Reading known answers took time too, but not the model's.
    busy = [receipt for receipt in receipts if receipt.computed_rows]
    # The clocks of two machines may differ, so the sum of the parts bounds the span.
    return max(0.0, min(span_seconds(busy), sum(receipt.seconds for receipt in busy)))


def latest_rate(receipts: Sequence[AnswersReceipt]) -> float | None:
    """Rows per second of the latest run that computed at least RATED_ROWS of `receipts`, if any."""
    # Fragments of a bundle with the same rows share one receipt; its work counts once.
    own = {(receipt.file_key, receipt.key): receipt for receipt in receipts}.values()
    rows: Counter[str] = Counter()
    for receipt in own:
        rows[receipt.run] += receipt.computed_rows
    rated = [receipt for receipt in own if rows[receipt.run] >= RATED_ROWS]
    if not rated:
        return None
    latest = max(rated, key=lambda receipt: receipt.began).run
    seconds = busy_seconds(receipt for receipt in rated if receipt.run == latest)
    return rows[latest] / seconds if seconds else None


def span_seconds(receipts: Sequence[AnswersReceipt]) -> float:
    """Seconds from the first start to the last end of `receipts`."""
    if not receipts:
        return 0.0
    end = max(receipt.began + receipt.seconds for receipt in receipts)
    return end - min(receipt.began for receipt in receipts)


def with_unlabelled(labels: Mapping[str, int], unlabelled: int) -> dict[str, int]:
    """`labels` and a count of the rows without one, if there are any, as a label of its own."""
    return {**labels, NO_LABEL: unlabelled} if unlabelled else dict(labels)


def population_stability(before: Mapping[str, int], now: Mapping[str, int]) -> float:
    """The population stability index between two label counts.

    0 means equal shares; 0.1 is a small shift and 0.25 a large one. The index is symmetric.
    Labels that nobody chose in either do not count.
    """
    labels = {label for label in before.keys() | now.keys() if before.get(label) or now.get(label)}
    index = 0.0
    for label in labels:
        old = _share(before, label, len(labels))
        new = _share(now, label, len(labels))
        index += (new - old) * log(new / old)
    return index


def _share(counts: Mapping[str, int], label: str, labels: int) -> float:
    # Add half a row to each label, because the logarithm needs a share above 0.
    return (counts.get(label, 0) + 0.5) / (sum(counts.values()) + 0.5 * labels)
