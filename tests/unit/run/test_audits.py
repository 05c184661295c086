"""Answers that fail an audit are not published: drifted labels, truncated, empty or long texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import AuditError
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report.facts import label_drift, label_shares
from glmbatch.report.report import read_report
from glmbatch.report.text import describe
from glmbatch.run.audits import audit_steps
from glmbatch.settings.job import ClassifyStep, GenerateStep
from tests.support import CLASSIFIER, CLASSIFY, Settings, Write, rows_of, run


def published(out: Path) -> dict[Path, bytes]:
    files = {}
    for path in out.rglob("*.parquet"):
        if "_glmbatch" not in path.parts:
            files[path] = path.read_bytes()
    return files


def test_labels_whose_shares_drifted_are_not_published(
    write_source: Write, job_settings: Settings, out: Path, rows: list[str | None]
) -> None:
    settings = job_settings()
    head = {
        "kind": "classify",
        "name": "mood",
        "model": str(CLASSIFIER),
        "audits": {"max_label_drift": 0.2},
    }
    settings["steps"] = [head]
    write_source("a.parquet", {"text": rows})
    first = run(settings)
    assert first.audits == (), "there is nothing to compare the first run with"
    (again,) = run(settings).audits
    assert again.measured == 0
    counts = first.steps[0].labels
    rarest = min((label for label in counts if counts[label]), key=lambda label: counts[label])
    texts = [row["text"] for row in rows_of(out) if row["mood"] == rarest]
    before = published(out)
    write_source("a.parquet", {"text": texts * 30})
    with pytest.raises(
        AuditError, match=r"nothing published: mood: label drift \d+\.\d+, at most 0\.2 allowed"
    ):
        run(settings)
    assert published(out) == before
    settings["steps"][0]["audits"]["max_label_drift"] = 100.0
    passed = run(settings)
    assert passed.computed == 0, "a limit does not change the answers"
    assert f"audit {passed.audits[0]}" in describe(passed)


def test_rows_that_lost_their_labels_are_drift(
    write_source: Write, job_settings: Settings, rows: list[str | None]
) -> None:
    write_source("a.parquet", {"text": rows})
    step = {**CLASSIFY, "audits": {"max_label_drift": 0.25}}
    run(job_settings(steps=[step]))
    with pytest.raises(AuditError, match=r"label drift \d+\.\d+, at most 0\.25 allowed"):
        run(job_settings(steps=[{**step, "abstain_below": 1.0}]))


def test_rows_with_several_labels_have_shares_and_drift(
    write_source: Write, job_settings: Settings, out: Path, rows: list[str | None]
) -> None:
    write_source("a.parquet", {"text": rows})
    step = {**CLASSIFY, "multiple": True, "audits": {"max_label_drift": 0.25}}
    settings = job_settings(steps=[{**step, "threshold": 1e-12}])
    first = run(settings)
    report = read_report(str(out), first.run)
    assert report is not None
    assert [share.share for share in label_shares(report, first.steps[0])] == [1, 1, 1]
    settings["steps"][0]["threshold"] = 0.999999
    with pytest.raises(AuditError, match=r"label drift \d+\.\d+, at most 0\.25 allowed"):
        run(settings)
    settings["steps"][0]["audits"] = {"max_label_drift": 100.0}
    second = run(settings)
    assert f"{len(rows)} without a label" in describe(second)
    report = read_report(str(out), second.run)
    assert report is not None
    assert [share.share_before for share in label_shares(report, second.steps[0])] == [1, 1, 1]
    assert f" {second.audits[0].measured:.4f} " in label_drift(report, second.steps[0])
    assert run(settings).audits[0].measured == 0


def receipt(step: str, **counts: Any) -> AnswersReceipt:
    return AnswersReceipt(key="", run="", fragment="", step=step, step_key="", rows=10, **counts)


def test_earlier_receipts_do_not_count_rows_without_labels() -> None:
    audits = {"max_label_drift": 0.25}
    step = ClassifyStep(name="topics", labels=["a", "b"], multiple=True, audits=audits)
    now = receipt("topics", labels={"a": 5}, unlabelled=5)
    earlier, before = receipt("topics", labels={"a": 5}), receipt("topics", labels={"a": 10})
    assert [audit.measured for audit in audit_steps([step], [], [earlier], [now])] == [0]
    counted = before.model_copy(update={"unlabelled": 0})
    (audit,) = audit_steps([step], [], [counted], [now])
    assert not audit.passed


def test_answers_that_all_became_empty_drift_in_length() -> None:
    step = GenerateStep(name="reply", audits={"max_length_drift": 0.5})
    before = receipt("reply", finish_reasons={"stop": 10}, answer_tokens=50)
    now = receipt("reply", finish_reasons={"stop": 10}, empty_answers=10)
    (audit,) = audit_steps([step], [], [before], [now])
    assert (audit.measured, audit.passed) == (1, False)
    earlier = receipt("reply", finish_reasons={"stop": 10})  # without lengths
    for pair in ([before], [earlier]), ([earlier], [now]), ([now], [before]):
        assert audit_steps([step], [], *pair) == []


def test_truncated_answers_are_not_published(
    write_source: Write, job_settings: Settings, out: Path, rows: list[str | None]
) -> None:
    write_source("a.parquet", {"text": rows})
    settings = job_settings()
    settings["steps"][1] |= {"max_tokens": 1, "audits": {"max_truncated_rate": 0.5}}
    with pytest.raises(
        AuditError, match=r"reply: share of truncated answers 1, at most 0\.5 allowed"
    ):
        run(settings)
    assert published(out) == {}
    settings["steps"][1]["audits"]["max_truncated_rate"] = 1.0
    assert run(settings).computed == 0


def test_empty_answers_are_counted(
    write_source: Write, job_settings: Settings, rows: list[str | None]
) -> None:
    write_source("a.parquet", {"text": rows})
    settings = job_settings()
    first = run(settings)
    assert first.audits == ()
    begin = str(first.samples[0]["reply"])[:1]
    settings["steps"][1] |= {"stop": [begin], "audits": {"max_empty_rate": 1.0}}
    (audit,) = run(settings).audits
    assert (audit.step, audit.what) == ("reply", "share of empty answers")
    settings["steps"][1]["audits"]["max_empty_rate"] = 0.0
    assert audit.measured > 0
    with pytest.raises(
        AuditError, match=r"share of empty answers 0\.\d+|share of empty answers 1\.000"
    ):
        run(settings)


def test_too_many_abstentions_are_not_published(
    write_source: Write, job_settings: Settings, out: Path, rows: list[str | None]
) -> None:
    """Also on the first night, and beside rows that fail or are not asked."""
    write_source("a.parquet", {"text": [*rows[:6], None, "short"]})
    settings = job_settings()
    for step in settings["steps"]:
        step |= {"abstain_below": 1.0, "when": "text != 'short'"}
        step["audits"] = {"max_abstained_rate": 0.5}
    with pytest.raises(AuditError, match=r"mood: share of rows abstained 1, at most 0\.5 allowed"):
        run({**settings, "max_error_rate": 1.0})
    assert published(out) == {}
    settings["steps"][0]["audits"]["max_abstained_rate"] = 1.0
    settings["steps"] = settings["steps"][:1]
    summary = run({**settings, "max_error_rate": 1.0})
    assert [audit.measured for audit in summary.audits] == [1.0]
    report = read_report(str(out), summary.run)
    assert report is not None and report.verdict is not None
    assert "mood abstained from 6 rows (100.0%)" in report.verdict.lines[0]


def test_much_longer_answers_are_not_published(
    write_source: Write, job_settings: Settings, out: Path, rows: list[str | None]
) -> None:
    write_source("a.parquet", {"text": rows})
    settings = job_settings()
    settings["steps"][1] |= {"max_tokens": 3, "audits": {"max_length_drift": 0.5}}
    assert run(settings).audits == (), "there is nothing to compare the first run with"
    (again,) = run(settings).audits
    assert (again.what, again.measured) == ("drift of the mean length", 0)
    before = published(out)
    settings["steps"][1]["max_tokens"] = 24
    with pytest.raises(
        AuditError, match=r"reply: drift of the mean length \d+\.\d+, at most 0\.5 allowed"
    ):
        run(settings)
    assert published(out) == before
    settings["steps"][1]["audits"]["max_length_drift"] = 100.0
    assert run(settings).computed == 0
