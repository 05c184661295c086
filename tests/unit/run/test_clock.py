"""A change of the system time during a run makes no duration negative or years long."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report.counts import busy_seconds
from glmbatch.report.report import read_report
from tests.support import CLASSIFY, Settings, Write, run


@pytest.mark.parametrize("jump", [-400 * 86_400.0, 400 * 86_400.0])
def test_durations_come_from_a_clock_that_never_jumps(
    jump: float, monkeypatch: pytest.MonkeyPatch, write_source: Write, job_settings: Settings
) -> None:
    def jumping(since: float = time.time()) -> Iterator[float]:
        while True:
            since += jump
            yield since

    times = jumping()
    monkeypatch.setattr(time, "time", lambda: next(times))
    write_source("a.parquet", {"text": [f"row {n}" for n in range(20)]})
    settings = job_settings(steps=[CLASSIFY])
    summary = run(settings)
    report = read_report(settings["data"]["output"], summary.run)
    assert report is not None
    durations = [summary.seconds, report.summary.seconds]
    for receipt in Ledger(settings["data"]["output"]).published_receipts():
        durations.append(receipt.seconds)
    assert all(0 <= seconds < 600 for seconds in durations), durations
    rate = summary.steps[0].rows_per_second
    assert rate is not None
    assert rate > 0.01


@pytest.mark.parametrize("apart", [-1e9, 0.0, 1e9])
def test_clocks_that_disagree_do_not_lengthen_a_run(apart: float) -> None:
    one = AnswersReceipt(
        key="k", run="r", fragment="f", step="s", step_key="k", rows=1, computed_rows=1, seconds=2
    )
    other = one.model_copy(update={"began": apart, "seconds": 3.0})
    assert 2 <= busy_seconds([one, other]) <= 5
