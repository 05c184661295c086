"""The oddest rows of a step: those with the least sure labels, or with the longest answers.

Their values are known from the one pass over the outputs. Their texts are read once that is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import OutputReceipt
from glmbatch.report.summary import short
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.parquet import read_columns
from glmbatch.store.values import prompt_values

ODDEST = 5  # of each step; as many files are opened once more
SAMPLE_CHARS = 300  # of a text in a report


class OddRow(BaseModel, frozen=True, extra="forbid"):
    """One row whose `value` is extreme: a low score, or a large number of generated tokens."""

    source: str
    row: int
    text: str
    answer: str
    value: float


class Extreme(NamedTuple):
    """A row of an output; the lower its `rank`, the odder."""

    rank: float
    output: OutputReceipt
    row: int


def extremes_of(column: pa.ChunkedArray, output: OutputReceipt, *, lowest: bool) -> list[Extreme]:
    """The rows of an output with the `lowest` values of `column`, or else the highest."""
    values = column.to_numpy().astype(np.float64)
    ranks = values if lowest else -values
    rows = np.flatnonzero(~np.isnan(ranks))  # null is NaN here
    if len(rows) > ODDEST:
        # Linear in the rows. Of equal ranks all stay, so that their order decides.
        limit = np.partition(ranks[rows], ODDEST - 1)[ODDEST - 1]
        rows = rows[ranks[rows] <= limit]
    return most_extreme(Extreme(float(ranks[row]), output, int(row)) for row in rows)


def most_extreme(extremes: Iterable[Extreme]) -> list[Extreme]:
    """The ODDEST of `extremes`, the oddest first; of equal ones the first."""
    return sorted(extremes, key=lambda extreme: extreme.rank)[:ODDEST]


def odd_rows(
    extremes: Sequence[Extreme], sources: Sequence[str], answer: str, ledger: Ledger
) -> list[OddRow]:
    """The rows with the values of their columns `sources` and `answer`; each file is read once."""
    names = list(dict.fromkeys([*sources, answer]))
    read: dict[tuple[str, int], pa.Table] = {}
    for output in {extreme.output.key: extreme.output for extreme in extremes}.values():
        path = ledger.outputs.path(output)
        table = read_columns(path, names, folder_columns(output.fragment.source))
        # A slice, because string views have no kernel to copy rows by.
        for extreme in extremes:
            if extreme.output.key == output.key:
                read[output.key, extreme.row] = table.slice(extreme.row, 1)
    rows = []
    for rank, output, row in extremes:
        table = read[output.key, row]
        texts = [str(prompt_values(table.column(source))[0]) for source in sources]
        rows.append(
            OddRow(
                source=output.fragment.source,
                row=int(output.fragment.numbers[row]),
                text=short(" · ".join(texts), SAMPLE_CHARS),
                answer=short(prompt_values(table.column(answer))[0], SAMPLE_CHARS),
                value=abs(rank),
            )
        )
    return rows
