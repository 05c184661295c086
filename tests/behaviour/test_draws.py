"""Several draws of a row are a vote: the same in any batch, and counted, kept and frozen as one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from glmbatch.ledger.verification import verify
from glmbatch.run.canary import freeze
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFY, GENERATE, Settings, Write, rows_of, run

TEXTS = [f"text number {row}" for row in range(6)]
# Few tokens to draw from, so that some texts are drawn twice.
DRAW = {"temperature": 1.0, "top_k": 2, "top_p": 1.0, "max_tokens": 2, "n": 5}
STEP = {**GENERATE, "prompt_template": "{text}", **DRAW}
LATER = {**CLASSIFY, "when": "reply_agreement < 0.5", "prompt_template": "{reply} {text}"}


def test_the_most_frequent_text_is_the_answer(
    write_source: Write, job_settings: Settings, out: Path, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": TEXTS})
    settings = job_settings(steps=[STEP, LATER])
    summary = run(settings)
    rows = rows_of(out)
    for row in rows:
        votes = Counter(text.strip() for text in row["reply_answers"])
        assert sum(votes.values()) == 5
        assert votes[row["reply"]] == max(votes.values())
        assert row["reply_agreement"] == votes[row["reply"]] / 5
        assert row["reply_completion_tokens"] <= 2
        assert (row["mood"] is None) == (row["reply_agreement"] >= 0.5)
    assert len({row["reply_agreement"] for row in rows}) > 1
    assert any(len(set(row["reply_answers"])) > 1 for row in rows)
    assert summary.steps[0].computed == len(rows)
    assert verify(str(out)).findings == ()
    freeze(out, tmp_path / "canary.parquet", 9)
    again = {**settings, "canary": str(tmp_path / "canary.parquet")}
    again["data"] = {**settings["data"], "output": str(tmp_path / "again")}
    again["runtime"] = {**settings.get("runtime", {}), "max_slots": 2, "max_batch_tokens": 16}
    write_source("a.parquet", {"text": TEXTS[::-1]})
    assert [audit.measured for audit in run(again).audits] == [0, 0]
    assert rows_of(tmp_path / "again") == rows[::-1]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({**STEP, "temperature": 0}, "n is 5, and at temperature 0 all draws are the same text"),
        ({**STEP, "n": 0}, "greater than or equal to 1"),
        ({**CLASSIFY, "n": 5}, "n is for generate steps"),
        ({"kind": "extract", "name": "facts", "fields": {"a": "text"}, "n": 5}, "n is for gen"),
    ],
)
def test_draws_without_a_sense_are_refused(
    step: dict[str, Any], reason: str, job_settings: Settings
) -> None:
    with pytest.raises(ValidationError, match=reason):
        JobConfig.model_validate(job_settings(steps=[step]))
