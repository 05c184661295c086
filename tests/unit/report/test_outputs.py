"""A report opens each output once and reads only what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from glmbatch.cli.plan import describe_plan
from glmbatch.report.report import read_report
from glmbatch.report.text import describe
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFY, GENERATE, Settings, Write, read_quarantine, rows_of, run


def test_outputs_are_opened_once_and_for_the_oddest(
    write_source: Write, job_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source("a.parquet", {"text": [f"text {n}" for n in range(7)] + [None] + ["x", "y"]})
    opened: list[str] = []
    real = pa.OSFile

    def counting(path: str) -> Any:
        opened.append(Path(path).parent.name)
        return real(path)

    monkeypatch.setattr(pa, "OSFile", counting)
    summary = run(job_settings(max_error_rate=0.5))
    assert summary.fragments == 2
    # Once for all values, and again for the oddest rows of each step, which are in one or both.
    assert 2 + 2 <= opened.count("staged") <= 2 + 2 * 2
    assert opened.count(out.name) == 0


def test_rows_of_each_label_come_from_several_files(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": [f"text {n}" for n in range(40)]})
    summary = run(job_settings(steps=[CLASSIFY], data__rows_per_fragment=4))
    report = read_report(str(out), summary.run)
    assert report is not None
    labels = summary.steps[0].labels
    shown = [sample.label for sample in report.measures[0].samples]
    assert shown == [label for label in labels for _ in range(min(2, labels[label]))]
    published = {row["text"]: row for row in rows_of(out)}
    for sample in report.measures[0].samples:
        assert published[sample.text]["mood"] == sample.label
        assert published[sample.text]["mood_score"] == sample.score


def test_samples_are_the_first_answered_rows(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    texts = [None] * 8 + ["one", None, "two", "three", "four"]
    write_source("a.parquet", {"text": texts, "id": range(13)})
    summary = run(job_settings(data__id_column="id", max_error_rate=0.9))
    assert [sample["text"] for sample in summary.samples] == ["one", "two", "three"]
    assert list(summary.samples[0]) == ["text", "mood", "reply"]
    failed = read_quarantine(out, "mood")
    assert [(line["row"], line["id"]) for line in failed] == [(n, str(n)) for n in [*range(8), 9]]


def test_a_prompt_without_columns_shows_no_rows(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["one"]})
    step = {**GENERATE, "prompt_template": "Say something."}
    settings = job_settings(steps=[step])
    note = "step 'reply' asks all rows the same: its prompt_template has no placeholder"
    assert note in describe_plan(preview(JobConfig.model_validate(settings)))
    summary = run(settings)
    assert summary.samples == ()
    assert note in describe(summary)
    plan = preview(JobConfig.model_validate(job_settings()))
    assert plan.notes == ()
