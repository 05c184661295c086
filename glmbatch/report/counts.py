"""Counts over receipts, and what may be read from them. Opens no file, knows no job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import log

from pydantic import BaseModel

from glmbatch.ledger.receipts import AnswersReceipt


class Audit(BaseModel, frozen=True, extra="forbid"):
    """One check that the job asks for: what was measured, and the most that is allowed.

    `seen` holds a few of the cases behind the number, for people.
    """

    step: str
    what: str
    measured: float
    allowed: float
    seen: tuple[str, ...] = ()  # the field's name is stored in reports

    @property
    def passed(self) -> bool:
        """Whether the run may publish."""
        return self.measured <= self.allowed

    def __str__(self) -> str:
        line = f"{self.step}: {self.what} {self.measured:.3g}, at most {self.allowed:.3g} allowed"
        return f"{line} ({'; '.join(self.seen)})" if self.seen else line


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums by name, largest first."""
    sums: Counter[str] = Counter()
    for count in counts:
        sums.update(count)
    return dict(sums.most_common())


def busy_seconds(receipts: Iterable[AnswersReceipt]) -> float:
    """Seconds in which the model worked on `receipts`; 0.0 where it was not asked.

    Fragments overlap, so this runs from the first start to the last end and is not a sum.
    """
    # Answers that were found on disk took time too, but not the model's.
    busy = [receipt for receipt in receipts if receipt.computed_rows]
    # The clocks of two machines may differ by any amount; no span is longer than all its parts.
    return max(0.0, min(span_seconds(busy), sum(receipt.seconds for receipt in busy)))


def span_seconds(receipts: Sequence[AnswersReceipt]) -> float:
    """Seconds from the first start to the last end of `receipts`."""
    if not receipts:
        return 0.0
    end = max(receipt.began + receipt.seconds for receipt in receipts)
    return end - min(receipt.began for receipt in receipts)


def population_stability(before: Mapping[str, int], now: Mapping[str, int]) -> float:
    """The population stability index of two counts of labels: 0 for equal shares, 0.25 for a
    large shift.
    """
    labels = before.keys() | now.keys()
    index = 0.0
    for label in labels:
        old = _share(before, label, len(labels))
        new = _share(now, label, len(labels))
        index += (new - old) * log(new / old)
    return index


def _share(counts: Mapping[str, int], label: str, labels: int) -> float:
    # Half a row is added to each label: the logarithm needs a share even where nobody chose it.
    return (counts.get(label, 0) + 0.5) / (sum(counts.values()) + 0.5 * labels)
