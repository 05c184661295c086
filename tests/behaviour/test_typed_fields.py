"""A job with typed fields: its columns, reuse, later prompts, audits and verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import AuditError
from glmbatch.ledger.verification import verify
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import Settings, Write, rows_of, run

FIELDS = {
    "product": {"type": "text", "nullable": True},
    "rating": {"type": "integer", "minimum": 1, "maximum": 5},
    "tone": {"choices": ["good", "bad"]},
    "days": {"type": "list", "items": "date", "max_items": 2},
}
EXTRACT = {"kind": "extract", "name": "facts", "fields": FIELDS, "max_tokens": 30}
REPLY = {"kind": "generate", "name": "reply", "prompt_template": "{facts}", "max_tokens": 3}


@pytest.fixture
def job(job_settings: Settings, write_source: Write) -> Settings:
    write_source("a.parquet", {"text": ['one "quote" }', "two\\", None, "four 好 \U0001f600"]})

    def settings(**overrides: Any) -> dict[str, Any]:
        return job_settings(**{"max_error_rate": 0.5, "steps": [EXTRACT, REPLY], **overrides})

    return settings


@pytest.mark.parametrize("layout", ["columns", "struct"])
def test_fields_are_published_checked_and_reused(job: Settings, out: Path, layout: str) -> None:
    settings = job(steps=[{**EXTRACT, "layout": layout}, REPLY])
    summary = run(settings)
    assert [step.computed for step in summary.steps] == [3, 3]
    rows = rows_of(out)
    assert [row["facts_error_type"] for row in rows] == [None, None, "null_value", None]
    assert rows[3]["reply"] is not None
    for row in (rows[0], rows[1], rows[3]):
        values = row["facts"] if layout == "struct" else {x: row[f"facts_{x}"] for x in FIELDS}
        assert 1 <= values["rating"] <= 5 and values["tone"] in ("good", "bad")
        assert 0.5 <= row["facts_tone_score"] <= 1
    assert verify(str(out)).sound
    # Deleted, so that the rows are written again from known answers.
    next(out.glob("a-*.parquet")).unlink()
    assert [step.to_run for step in preview(JobConfig.model_validate(settings)).steps] == [0, 0]
    assert [step.computed for step in run(settings).steps] == [0, 0]
    assert rows_of(out) == rows


def test_another_schema_asks_all_rows_again(job: Settings, out: Path) -> None:
    run(job(steps=[EXTRACT]))
    other = {**EXTRACT, "fields": {**FIELDS, "rating": {"type": "integer", "minimum": 2}}}
    assert run(job(steps=[{**other, "max_tokens": 60}])).steps[0].computed == 3
    assert all(row["facts_rating"] is None or row["facts_rating"] >= 2 for row in rows_of(out))


def test_too_many_cut_answers_are_not_published(job: Settings) -> None:
    strict = {**EXTRACT, "max_tokens": 5, "audits": {"max_truncated_rate": 0.0}}
    with pytest.raises(AuditError, match="share of truncated answers"):
        run(job(steps=[strict]))
