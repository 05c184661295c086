"""The log lines of a run, for Prefect's page and for `-v`."""

from __future__ import annotations

import logging

import pytest

from glmbatch.errors import AuditError
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
