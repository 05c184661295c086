"""Unsure answers are left out, counted apart from failures, and may be asked of another step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from glmbatch.ledger.verification import verify
from glmbatch.report.text import describe
from glmbatch.run.canary import freeze
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFY, GENERATE, Settings, Write, read_quarantine, rows_of, run

ROWS = 20


@pytest.fixture
def answered(write_source: Write, job_settings: Settings, out: Path) -> list[dict[str, Any]]:
    """The rows of a run with the numbers of every answer."""
    write_source("a.parquet", {"text": [f"text number {row}" for row in range(ROWS)]})
    output = str(out.parent / "sure")
    steps = [CLASSIFY, {**GENERATE, "prompt_template": "{text}", "confidence": True}]
    run(job_settings(steps=steps, data__output=output))
    return rows_of(Path(output))


def middle(values: list[float]) -> float:
    return sorted(values)[ROWS // 2]


def test_unsure_answers_are_null_and_no_failures(
    answered: list[dict[str, Any]], job_settings: Settings, out: Path, tmp_path: Path
) -> None:
    least_score = middle([row["mood_score"] for row in answered])
    least_token = middle([math.exp(row["reply_mean_log_prob"]) for row in answered])
    steps = [
        {**CLASSIFY, "abstain_below": least_score},
        {**GENERATE, "prompt_template": "{text}", "abstain_below": least_token},
        {**CLASSIFY, "name": "second", "when": "mood is null"},
        {**GENERATE, "name": "note"},
    ]
    settings = job_settings(steps=steps, max_error_rate=0.0)
    summary = run(settings)
    assert "20 computed, 0 reused, 10 abstained" in describe(summary)
    assert [step.failed for step in summary.steps] == [0] * 4
    for sure, row in zip(answered, rows_of(out), strict=True):
        for step, is_sure in (
            ("mood", row["mood_score"] >= least_score),
            ("reply", math.exp(row["reply_mean_log_prob"]) >= least_token),
        ):
            assert row[step] == (sure[step] if is_sure else None)
            assert row[f"{step}_error_type"] == (None if is_sure else "abstained")
            assert row[f"{step}_error"] is None
        assert row["mood_scores"] == sure["mood_scores"]
        assert row["reply_least_log_prob"] == sure["reply_least_log_prob"]
        # The second step answers what the first did not, and a prompt needs an answer.
        assert (row["second"] is None) == (row["mood"] is not None)
        assert row["note_error_type"] == (None if row["mood"] else "not_asked")
    assert verify(str(out)).findings == ()
    assert read_quarantine(out) == []
    # A new copy of the rows takes the known answers, also those without a label.
    (tmp_path / "in" / "a.parquet").rename(tmp_path / "in" / "b.parquet")
    again = run(settings)
    assert [(step.computed, step.abstained) for step in again.steps[:2]] == [(0, 10), (0, 10)]
    freeze(out, tmp_path / "canary.parquet", ROWS)
    settings["canary"] = str(tmp_path / "canary.parquet")
    settings["data"]["output"] = str(tmp_path / "again")
    assert [audit.measured for audit in run(settings).audits] == [0, 0, 0, 0]


def test_a_label_may_have_its_own_threshold(
    answered: list[dict[str, Any]], job_settings: Settings, out: Path
) -> None:
    first = answered[0]["mood"]
    least = {label: 1.0 for label in CLASSIFY["labels"]}
    least[first] = middle([row["mood_score"] for row in answered if row["mood"] == first])
    run(job_settings(steps=[{**CLASSIFY, "abstain_below": least}]))
    for sure, row in zip(answered, rows_of(out), strict=True):
        is_sure = sure["mood_score"] >= least[sure["mood"]]
        assert row["mood"] == (sure["mood"] if is_sure else None)
        assert row["mood_scores"] == sure["mood_scores"]
    # A label that is left out is always given.
    run(job_settings(steps=[{**CLASSIFY, "abstain_below": {first: least[first]}}]))
    given = [sure["mood"] != first or sure["mood_score"] >= least[first] for sure in answered]
    assert [row["mood"] is not None for row in rows_of(out)] == given


def test_later_steps_may_use_the_numbers_of_unsure_answers(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    source = write_source("a.parquet", {"text": [f"text {row}" for row in range(4)]})
    draws = {"temperature": 1.0, "n": 3, "min_tokens": 2, "abstain_below": 0.9999}
    judge = {**CLASSIFY, "name": "judge", "prompt_template": "{reply_answers}"}
    steps = [
        {**CLASSIFY, "abstain_below": 1.0},
        {**GENERATE, "prompt_template": "{text}", **draws},
        {**judge, "when": "reply_error_type == 'abstained'"},
        {**judge, "name": "again", "prompt_template": "{mood_score} {mood_scores}: {text}"},
        {**judge, "name": "never", "prompt_template": "{mood} {mood_score}"},
    ]
    settings = job_settings(steps=steps)
    assert [step.failed for step in run(settings).steps] == [0] * 5
    for row in rows_of(out):
        assert (row["mood"], row["reply"]) == (None, None)
        assert row["judge"] is not None and row["again"] is not None
        assert row["never_error_type"] == "not_asked"
    # A new copy of the rows is planned from known answers.
    source.rename(source.with_name("b.parquet"))
    plan = preview(JobConfig.model_validate(settings)).steps
    assert [(step.to_run, step.not_asked) for step in plan] == [(0, 0)] * 4 + [(0, 4)]
