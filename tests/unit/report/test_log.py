"""The log lines of a run, for Prefect's page and for `-v`."""

from __future__ import annotations

import logging

import pytest

from glmbatch.errors import AuditError
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report import log
from glmbatch.report.progress import Progress
from glmbatch.report.text import LEFT_OUT_SHOWN
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.support import Settings, Write


def test_a_run_logs_left_out_files_and_audits(
    write_source: Write,
    job_settings: Settings,
    own_engines: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_source("a.parquet", {"text": ["one", "one", None]})
    write_source("b.parquet", {"text": ["two"]}).write_bytes(b"PAR1 is all there is")
    settings = job_settings(max_error_rate=1.0)
    settings["steps"][1]["audits"] = {"max_truncated_rate": 1.0}
    caplog.set_level(logging.INFO, "glmbatch")
    run_job(JobConfig.model_validate(settings))
    assert "3 rows of 1 file in 1 fragment; unchanged files: 0; files left out: 1" in caplog.text
    assert "b.parquet: left out: " in caplog.text
    assert ": loaded in " in caplog.text
    first = "mood, a.parquet@0: 3 rows, 1 answered by the model, 0 reused, 1 repeated, "
    assert f"{first}1 failed (null_value 1) in " in caplog.text
    assert "failed: a.parquet: row 2, mood: text is null" in caplog.text
    assert "audit passed: reply: share of truncated answers" in caplog.text
    assert ": published 3 rows in 1 file; 1 failed, files or fragments left out: 1" in caplog.text


def test_a_run_logs_reuse_and_why_it_is_refused(
    write_source: Write, job_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    write_source("a.parquet", {"text": ["one", "two"]})
    run_job(JobConfig.model_validate(job_settings()))
    settings = job_settings()
    settings["steps"][1]["audits"] = {"max_truncated_rate": 0.0}
    settings["steps"][1]["max_tokens"] = 1
    caplog.set_level(logging.INFO, "glmbatch")
    with pytest.raises(AuditError):
        run_job(JobConfig.model_validate(settings))
    assert "mood, a.parquet@0: 2 rows, 0 answered by the model, 2 reused" in caplog.text
    assert "audit failed: reply: share of truncated answers 1, at most 0 allowed" in caplog.text
    assert ": nothing published: reply: share of truncated answers" in caplog.text


def test_a_large_run_has_few_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 bundles log the first ones, then one line for each percent at most."""
    monkeypatch.setattr(log, "SECONDS_APART", 0.0)
    caplog.set_level(logging.INFO, "glmbatch")
    progress = Progress()
    progress.start("annotate", 50_000)
    lines = log.AnswersLog("r", progress)
    for number in range(5_000):
        progress.add(9, computed=True)
        progress.add(1, computed=False)
        lines.add([receipt_of(f"{number}.parquet@0", unusable=None)])
        lines.add([receipt_of(f"{number}.parquet@9", unusable="is damaged")])
    assert 100 < len(caplog.messages) <= log.BUNDLES_SHOWN + LEFT_OUT_SHOWN + 100
    assert caplog.messages[0].startswith("mood, 0.parquet@0: 10 rows, 9 answered by the model")
    last = caplog.messages[-1]
    assert last.startswith("50,000 of 50,000 answers (100%): 45,000 by the model, ")
    assert last.endswith("; 5,000 failed (null_value 5,000)")
    monkeypatch.setattr(log, "SECONDS_APART", 60.0)
    progress.start("annotate", 100_000)
    lines.add([receipt_of("a.parquet@0", unusable=None)])
    assert caplog.messages[-1] == last, "no line soon after another"


def receipt_of(fragment: str, unusable: str | None) -> AnswersReceipt:
    return AnswersReceipt(
        key="k",
        run="r",
        fragment=fragment,
        step="mood",
        step_key="s",
        rows=10,
        computed_rows=9,
        faults={} if unusable else {"null_value": 1},
        unusable=unusable,
    )
