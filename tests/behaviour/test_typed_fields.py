"""A job with typed fields: its columns, reuse, later prompts, audits and verification."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import AuditError
from glmbatch.glm.tokenizer import chat_prompt, load_tokenizer
from glmbatch.ledger.verification import verify
from glmbatch.report.text import describe
from glmbatch.run.canary import freeze
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.soak.runs import Forks, Kill
from tests.support import CAUSAL, Settings, Write, rows_of, run

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


NAMES = ("reply", "null", "none")


def test_later_steps_use_single_fields(job: Settings, out: Path, tmp_path: Path) -> None:
    template = "{facts_rating} {facts_tone} {facts_tone_score} {facts_days}: {text}"
    some = {**REPLY, "prompt_template": template, "when": "facts_rating <= 5"}
    null = {**REPLY, "name": "null", "prompt_template": "{facts_product}"}
    none = {**null, "name": "none", "when": "not facts_rating <= 5"}
    settings = job(steps=[EXTRACT, some, null, none])
    before = preview(JobConfig.model_validate(settings)).steps
    assert [(step.waiting, step.skipped) for step in before] == [(0, 1), (3, 1), (3, 1), (3, 1)]
    run(settings)
    rows = rows_of(out)
    tokenizer = load_tokenizer(CAUSAL)
    for row in rows:
        if row["facts"] is None:
            assert {row[f"{name}_error_type"] for name in NAMES} == {"earlier_step_failed"}
            continue
        days = ", ".join(map(str, row["facts_days"]))
        shown = f"{row['facts_rating']} {row['facts_tone']} {row['facts_tone_score']} {days}"
        (ids,) = tokenizer.encode([chat_prompt(f"{shown}: {row['text']}")])
        assert row["reply_prompt_tokens"] == len(ids)
        # A field that the model left null is no failure.
        has_product = row["facts_product"] is not None
        assert row["null_error_type"] == (None if has_product else "not_asked")
        assert row["none_error_type"] == "not_asked"
    again = preview(JobConfig.model_validate(settings)).steps
    assert sum(step.to_run for step in again) == 0
    next(out.glob("a-*.parquet")).unlink()
    assert [step.computed for step in run(settings).steps] == [0, 0, 0, 0]
    assert rows_of(out) == rows
    freeze(out, tmp_path / "canary.parquet", 2)
    settings["canary"] = str(tmp_path / "canary.parquet")
    settings["data"]["output"] = str(tmp_path / "again")
    assert [audit.measured for audit in run(settings).audits] == [0, 0, 0]


def test_a_later_field_is_refused(job: Settings) -> None:
    early = {**REPLY, "prompt_template": "{facts_product}"}
    with pytest.raises(ValueError, match="uses 'facts_product', which step 'facts' does not"):
        JobConfig.model_validate(job(steps=[early, EXTRACT]))


def sureness(row: dict[str, Any], name: str) -> float:
    """What is compared with `abstain_below`."""
    score = row.get(f"facts_{name}_score")
    return math.exp(row[f"facts_{name}_mean_log_prob"]) if score is None else score


@pytest.mark.parametrize("layout", ["columns", "struct"])
def test_unsure_fields_are_null_and_listed(
    job: Settings, out: Path, tmp_path: Path, layout: str
) -> None:
    sure_step = {**EXTRACT, "layout": layout, "confidence": True}
    run(job(steps=[sure_step], data__output=str(tmp_path / "sure")))
    sure_rows = rows_of(tmp_path / "sure")
    asked = [at for at, row in enumerate(sure_rows) if row["facts_error_type"] is None]
    least = sorted(sureness(sure_rows[at], name) for at in asked for name in FIELDS)[5]
    unsure_step = {**EXTRACT, "layout": layout, "abstain_below": least}
    settings = job(steps=[unsure_step, REPLY])
    assert [step.failed for step in run(settings).steps] == [1, 1]
    rows = rows_of(out)
    given = (value_of(sure_rows[at], name, layout) for at in asked for name in FIELDS)
    assert sum(value is not None for value in given) > 6
    assert sum(len(rows[at]["facts_abstained"]) for at in asked) == 5
    for at in asked:
        unsure = [name for name in FIELDS if sureness(sure_rows[at], name) < least]
        assert rows[at]["facts_abstained"] == unsure
        assert rows[at]["facts_error_type"] is None
        for name in FIELDS:
            value = None if name in unsure else value_of(sure_rows[at], name, layout)
            assert value_of(rows[at], name, layout) == value
            assert sureness(rows[at], name) == pytest.approx(sureness(sure_rows[at], name))
    assert verify(str(out)).sound
    next(out.glob("a-*.parquet")).unlink()
    assert [step.computed for step in run(settings).steps] == [0, 0]
    assert rows_of(out) == rows
    freeze(out, tmp_path / "canary.parquet", 2)
    settings["canary"] = str(tmp_path / "canary.parquet")
    settings["data"]["output"] = str(tmp_path / "again")
    assert [audit.measured for audit in run(settings).audits] == [0, 0]


def value_of(row: dict[str, Any], name: str, layout: str) -> Any:
    return row["facts"][name] if layout == "struct" else row[f"facts_{name}"]


@pytest.mark.parametrize("layout", ["columns", "struct"])
def test_a_row_without_a_sure_field_has_no_answer(
    job: Settings, out: Path, tmp_path: Path, layout: str
) -> None:
    settings = job(steps=[{**EXTRACT, "layout": layout, "abstain_below": 1.0}, REPLY])
    summary = run(settings)
    assert [step.abstained for step in summary.steps] == [3, 0]
    assert "3 abstained" in describe(summary)
    for row in rows_of(out):
        answered = row["text"] is not None
        assert row["facts"] is None and row["reply"] is None
        assert row["facts_error_type"] == ("abstained" if answered else "null_value")
        assert row["facts_abstained"] == (list(FIELDS) if answered else None)
        assert row["reply_error_type"] == ("not_asked" if answered else "earlier_step_failed")
        assert (row["facts_tone_score"] is None) != answered
    assert verify(str(out)).sound
    freeze(out, tmp_path / "canary.parquet", 2)
    settings["canary"] = str(tmp_path / "canary.parquet")
    settings["data"]["output"] = str(tmp_path / "again")
    assert run(settings).audits[0].measured == 0


def test_another_schema_asks_all_rows_again(job: Settings, out: Path) -> None:
    run(job(steps=[EXTRACT]))
    other = {**EXTRACT, "fields": {**FIELDS, "rating": {"type": "integer", "minimum": 2}}}
    assert run(job(steps=[{**other, "max_tokens": 60}])).steps[0].computed == 3
    assert all(row["facts_rating"] is None or row["facts_rating"] >= 2 for row in rows_of(out))


def test_too_many_cut_answers_are_not_published(job: Settings) -> None:
    strict = {**EXTRACT, "max_tokens": 5, "audits": {"max_truncated_rate": 0.0}}
    with pytest.raises(AuditError, match="share of truncated answers"):
        run(job(steps=[strict]))


KILLS = int(os.environ.get("KILLS", "2"))


@pytest.mark.slow
@pytest.mark.timeout(120 + 20 * KILLS)
def test_killed_extractions_equal_an_undisturbed_one(
    job_settings: Settings, write_source: Write, tmp_path: Path
) -> None:
    texts = [None if at % 9 == 4 else f"row {at} is {'好' * (at % 5)}" for at in range(40)]
    write_source("a.parquet", {"text": texts})
    rng = random.Random(int(os.environ.get("KILLS_SEED", "1")))
    sampled = {**EXTRACT, "confidence": True, "temperature": 1.0, "max_tokens": 24}

    def settings(name: str) -> dict[str, Any]:
        output = str(tmp_path / name)
        return job_settings(
            steps=[sampled], max_error_rate=0.5, data__output=output, data__rows_per_fragment=8
        )

    forks = Forks(tmp_path)
    killed = 0
    try:
        undisturbed = forks.run(settings("undisturbed"))
        expected = rows_of(tmp_path / "undisturbed")
        assert (undisturbed.end, undisturbed.asked) == ("published", 2 * len(texts) - 8)
        for number in range(KILLS):
            kind: Any = rng.choice(["before name", "after name", "prompt"])
            most = undisturbed.asked if kind == "prompt" else undisturbed.names
            kill = Kill(kind, rng.randint(1, most))
            first = forks.run(settings(f"{number}"), kill)
            again = forks.run(settings(f"{number}"))
            killed += first.end == "killed"
            assert again.end == "published", (kill, again)
            # A row of the bundle in flight alone is asked again, for its choice and for the rest.
            assert first.asked + again.asked <= undisturbed.asked + 2 * 8, kill
            assert_same_rows(rows_of(tmp_path / f"{number}"), expected)
            assert verify(str(tmp_path / f"{number}")).sound
    finally:
        forks.close()
    assert killed == KILLS


def assert_same_rows(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Assert that the rows are equal, and their numbers up to rounding."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for name, value in row.items():
            close = (
                pytest.approx(other[name], abs=1e-5) if isinstance(value, float) else other[name]
            )
            assert value == close, name
