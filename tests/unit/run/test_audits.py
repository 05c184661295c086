"""Answers that fail an audit are not published: drifted labels, truncated, empty or long texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmbatch.errors import AuditError
from glmbatch.report.text import describe
from tests.support import CLASSIFIER, Settings, Write, rows_of, run


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
    rarest = min(counts, key=lambda label: counts[label])
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
