"""The flow on a real Prefect server: states, retries, cached results and failures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from glmbatch.errors import AuditError
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.flows.commands import artifacts, last_flow_run, log_lines, query, run, run_new, task_runs
from tests.support import (
    CAUSAL,
    CLASSIFY,
    ROOT,
    Settings,
    Write,
    committed,
    rows_of,
    touch_published,
)
from tests.unit.tuning.rows import WORDS, labelled
from tests.unit.tuning.test_baseline_model import exported, parts_of

pytestmark = [pytest.mark.prefect, pytest.mark.slow]

# The flow with an engine that fails to load the first time, as if the device were lost.
FLAKY = """
import sys
from glmbatch.run import session
from glmbatch.errors import TransientError
from glmbatch.glm.engine.loading import load_engine
from glmbatch.settings.jobfile import load_job

tries = []

def load_at_second_try(*arguments):
    tries.append(arguments)
    if len(tries) == 1:
        raise TransientError("the device was lost")
    return load_engine(*arguments)

session.load_engine = load_at_second_try
from flows.annotate import annotate
summary = annotate(load_job(sys.argv[1]))
print(summary.computed)
"""


@pytest.fixture
def job_file(tmp_path: Path, job_settings: Settings, write_source: Write) -> str:
    write_source("day=1/a.parquet", {"text": [f"row {n}" for n in range(12)] + [None]})
    write_source("day=2/b.parquet", {"text": ["one", "two"]})
    path = tmp_path / "job.yaml"
    settings = job_settings(max_error_rate=0.5)
    settings["steps"][1]["audits"] = {"max_empty_rate": 1.0}
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_a_second_run_takes_its_tasks_from_the_cache(
    prefect_server: dict[str, str], job_file: str, tmp_path: Path, out: Path
) -> None:
    # Its imports last until the sources are old enough for their stamps to be recorded.
    first = run_new(prefect_server, "-m", "glmbatch.cli.main", "run", job_file)
    assert first.returncode == 3, first.stderr
    assert "15 rows in 3 fragments" in first.stdout
    assert last_flow_run(prefect_server)["state_type"] == "COMPLETED"
    tasks = task_runs(prefect_server, 14)
    for fragment in ("day=1/a.parquet@0", "day=1/a.parquet@8", "day=2/b.parquet@0"):
        assert tasks.pop(f"classify mood {fragment}")["state_name"] == "Completed"
        assert tasks.pop(f"generate reply {fragment}")["state_name"] == "Completed"
        assert tasks.pop(f"write {fragment}")["state_name"] == "Completed"
    others = {"assign", "check", "ingest", "locate", "prepare", "publish"}
    assert {name.split()[0] for name in tasks} <= others
    assert f"assign {tmp_path / 'in'}" in tasks
    assert f"publish {out}" in tasks
    assert_page_shows_the_run(prefect_server, out, first.stdout)
    assert_log_shows_the_run(prefect_server, out)
    answers = ds.dataset(out, partitioning=None).to_table()

    importtime = ("-X", "importtime")
    second = run_new(prefect_server, *importtime, "-m", "glmbatch.cli.main", "run", job_file)
    assert second.returncode == 3, second.stderr
    assert not {"torch", "transformers", "pandas"} & imported(second.stderr), "seconds for nothing"
    assert "no inference was executed and no model was loaded" in second.stdout
    assert "unchanged sources: 2" in second.stdout
    tasks = task_runs(prefect_server, 5)
    assert not states(tasks, "classify", "generate", "write"), "unchanged files made tasks"
    assert states(tasks, "prepare") == {"Cached"}
    assert ds.dataset(out, partitioning=None).to_table().equals(answers)

    touch_published(out)
    again = run(prefect_server, "-m", "glmbatch.cli.main", "run", job_file)
    assert again.returncode == 3, again.stderr
    tasks = task_runs(prefect_server, 14)
    assert states(tasks, "classify", "generate", "write", "prepare") == {"Cached"}
    assert ds.dataset(out, partitioning=None).to_table().equals(answers)

    touch_published(out)
    for path in out.glob("_glmbatch/answers/*"):
        path.unlink()
    third = run(prefect_server, "-m", "glmbatch.cli.main", "run", job_file)
    assert "no inference was executed" in third.stdout, "published rows were not reused"
    tasks = task_runs(prefect_server, 14)
    assert states(tasks, "classify") == {"Completed"}, "cached results without files were used"
    assert ds.dataset(out, partitioning=None).to_table().equals(answers)


def test_small_files_share_tasks(
    prefect_server: dict[str, str],
    job_settings: Settings,
    write_source: Write,
    tmp_path: Path,
    out: Path,
) -> None:
    for number in range(70):
        write_source(f"{number:02}.parquet", {"text": [f"row {number}"]})
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_settings(steps=[CLASSIFY])))
    for state in ("Completed", "Cached"):
        done = run(prefect_server, "-m", "glmbatch.cli.main", "run", str(path))
        assert done.returncode == 0, done.stderr
        assert "70 rows in 70 fragments" in done.stdout
        tasks = task_runs(prefect_server, 2 * 35 + 5)
        for number in range(0, 70, 2):
            bundle = f"{number:02}.parquet@0 and 1 more fragment"
            assert tasks[f"classify mood {bundle}"]["state_name"] == state
            assert tasks[f"write {bundle}"]["state_name"] == state
        assert ds.dataset(out, partitioning=None).count_rows() == 70
        touch_published(out)


def imported(importtime: str) -> set[str]:
    """The modules in what `python -X importtime` printed."""
    lines = [line for line in importtime.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "prefect.flows" in modules
    return modules


def states(tasks: dict[str, dict[str, Any]], *kinds: str) -> set[str]:
    """The states of all tasks of these kinds."""
    return {row["state_name"] for name, row in tasks.items() if name.startswith(kinds)}


def assert_log_shows_the_run(environment: dict[str, str], out: Path) -> None:
    """The log of the last flow run reports input, loading, answers, failures and publication."""
    log = "\n".join(log_lines(environment))
    assert "/in: 15 rows of 2 files in 3 fragments; unchanged files: 0; files left out: 0" in log
    assert re.search(rf"{CAUSAL.name}: loaded in \d+\.\d s", log), log
    assert re.search(r"mood, day=2/b.parquet@0: 2 rows, 2 answered by the model, .* in \d", log)
    assert "1 failed (null_value 1)" in log
    assert re.search(r"failed: day=1/a.parquet: row 12, mood: text is null", log), log
    assert "audit passed: reply: share of empty answers" in log
    assert "reply, total: 15 rows, 14 answered by the model, 0 reused, 0 repeated" in log
    assert f"{out}: published 15 rows in 3 files; 1 failed, files or fragments left out: 0" in log


def assert_page_shows_the_run(environment: dict[str, str], out: Path, printed: str) -> None:
    """The page of the last flow run has its progress, errors, facts and the report's address."""
    shown = artifacts(environment)
    (page,) = out.glob("_glmbatch/reports/*.html")
    assert f"Read about the run: {page}" in printed
    assert f"({page.as_uri()})" in shown["annotate-report"]["data"]
    assert shown["annotate-progress"]["data"] == 100.0
    assert shown["annotate-progress"]["description"] == "3 of 3 fragments"
    assert json.loads(shown["annotate-errors"]["data"]) == [
        {"step": "mood", "reason": "null_value", "rows": 1},
        {"step": "reply", "reason": "earlier_step_failed", "rows": 1},
    ]
    lines = shown["annotate"]["data"].splitlines()
    facts = [line.strip("| ").split(" | ") for line in lines if line]
    assert facts[0] == [r"Published\: 15 rows\, 1 row failed \(6\.7\%\)\, 1 audit passed\."]
    assert facts[1][0].startswith("No earlier run was published")
    assert facts[2][0].startswith("Look first at 1 row that failed in mood with null")
    assert ["run", page.stem] in facts
    assert ["size", "15 rows in 3 fragments"] in facts
    assert ["answers", "30"] in facts


def test_a_transient_fault_is_retried_and_costs_nothing(
    prefect_server: dict[str, str], job_file: str
) -> None:
    done = run(prefect_server, "-c", FLAKY, job_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "28"
    counts = [
        row["run_count"]
        for name, row in task_runs(prefect_server, 14).items()
        if name.startswith("classify")
    ]
    assert sorted(counts) == [1, 1, 2]


def test_bad_input_fails_without_retry_or_traceback(
    prefect_server: dict[str, str], job_file: str, tmp_path: Path
) -> None:
    done = run(prefect_server, "-m", "glmbatch.cli.main", "run", job_file, "--on-error", "raise")
    assert done.returncode == 2
    # Prefect may print other lines.
    lines = [line for line in done.stderr.splitlines() if line.startswith("glmbatch: ")]
    (line,) = lines
    assert "in/day=1/a.parquet: row 12, step 'mood': text is null." in line
    assert line.endswith("Fix the row, or set on_error to quarantine.")
    assert "Traceback" not in done.stderr
    assert last_flow_run(prefect_server)["state_type"] == "FAILED"
    assert not (tmp_path / "out" / "_manifest.json").exists()
    failed = [row for row in task_runs(prefect_server, 6).values() if row["state_type"] == "FAILED"]
    assert {row["run_count"] for row in failed} == {1}


def test_too_many_bad_rows_exit_with_code_1(prefect_server: dict[str, str], job_file: str) -> None:
    done = run(
        prefect_server, "-m", "glmbatch.cli.main", "run", job_file, "--set", "max_error_rate=0.01"
    )
    assert done.returncode == 1
    assert (
        "nothing published: 1 of 15 rows failed (6.7%), max_error_rate allows 1.0%" in done.stderr
    )
    assert "nothing published: 1 of 15 rows failed" in "\n".join(log_lines(prefect_server))
    shown = artifacts(prefect_server)
    assert shown["annotate"]["data"].startswith("Refused")
    assert shown["annotate-report"]["data"].split("file://")[1].rstrip(")") in done.stderr


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_exits_cleanly_and_resumes(
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
    out: Path,
    signal_number: int,
    code: int,
) -> None:
    write_source("a.parquet", {"text": [f"row {n}" for n in range(200)]})
    settings = job_settings(data__rows_per_fragment=10, runtime__max_slots=1)
    settings["steps"][1]["max_tokens"] = 60
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    command = [sys.executable, "-m", "glmbatch.cli.main", "run", str(path)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, "PREFECT_HOME": str(tmp_path / "home")},
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as started:
        until = time.monotonic() + 240
        while len(committed(out)) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(started.pid, signal_number)
        _, printed = started.communicate(timeout=60)
    assert started.returncode == code, printed
    last_line = printed.splitlines()[-1]
    assert last_line == "glmbatch: interrupted; run the same command again to resume."
    assert "Traceback" not in printed
    answered = len(committed(out))
    assert 3 <= answered < 40
    settings["runtime"]["max_slots"] = 16  # changes only the speed
    assert run_job(JobConfig.model_validate(settings)).computed == 400 - 10 * answered


def test_another_flow_runs_the_job_as_a_subflow(
    prefect_server: dict[str, str], tmp_path: Path
) -> None:
    done = run(prefect_server, "sample_data/examples/in_a_flow.py", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("60 rows, ")
    assert "Rice Cooker" in done.stdout
    inner, outer = query(prefect_server, "flow_runs", {"sort": "START_TIME_DESC", "limit": 2})
    assert [inner["state_type"], outer["state_type"]] == ["COMPLETED", "COMPLETED"]
    assert inner["name"] == "annotate sample_data/reviews"
    assert inner["parent_task_run_id"] is not None


# A run of a schedule that a worker starts weeks late, twice.
LATE = """
import sys
from datetime import UTC, datetime
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled
from flows.annotate import annotate
from glmbatch.settings.jobfile import load_job

job = {"job": load_job(sys.argv[1])}
meant = Scheduled(scheduled_time=datetime(2026, 11, 1, 23, 30, tzinfo=UTC))
with get_client(sync_client=True) as client:
    run = client.create_flow_run(annotate, parameters=job, state=meant)
    run_flow(annotate, flow_run=run, parameters=job)
    client.set_flow_run_state(run.id, Scheduled(), force=True)
    run_flow(annotate, flow_run=client.read_flow_run(run.id), parameters=job)
"""


def test_a_late_run_reads_the_day_that_it_was_meant_for(
    prefect_server: dict[str, str], job_file: str, out: Path
) -> None:
    job = yaml.safe_load(Path(job_file).read_text())
    job["data"] |= {"where": "day = '{today:%-d}' or day = '{today}'", "time_zone": "Asia/Tokyo"}
    Path(job_file).write_text(yaml.safe_dump(job))
    done = run(prefect_server, "-c", LATE, job_file)
    assert done.returncode == 0, done.stderr
    assert ds.dataset(out, partitioning=None).to_table()["text"].to_pylist() == ["one", "two"]
    manifest = json.loads((out / "_manifest.json").read_text())
    assert manifest["where"] == "day = '2' or day = '2026-11-02'"
    assert len(list((out / "_glmbatch" / "reports").glob("*.json"))) == 2


def test_a_worse_change_is_measured_and_refused(
    prefect_server: dict[str, str],
    job_settings: Settings,
    write_source: Write,
    tmp_path: Path,
    out: Path,
) -> None:
    """The measurement is a task of its own; the refusal and its reason are seen in Prefect."""
    texts = [f"row {number}" for number in range(20)]
    write_source("a.parquet", {"text": texts[:5]})
    labelled = tmp_path / "labelled.parquet"
    run_job(JobConfig.model_validate(job_settings(steps=[CLASSIFY])))
    # All labels that the tiny model gives are right but one, which only the changed step can give.
    answers = ds.dataset(out, partitioning=None).to_table().column("mood").to_pylist()
    pq.write_table(pa.table({"text": texts, "mood": [answers[0]] * 19 + ["poor"]}), labelled)
    settings = job_settings(steps=[CLASSIFY], evaluate=str(labelled))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = run(prefect_server, "-m", "glmbatch.cli.main", "run", str(path))
    assert done.returncode == 0, done.stderr
    assert "measured: mood scores" in done.stdout and "unchanged" in done.stdout
    assert states(task_runs(prefect_server, 5), "measure") == {"Completed"}

    settings["steps"] = [{**CLASSIFY, "labels": ["fine", "poor", "middling"]}]
    path.write_text(yaml.safe_dump(settings))
    # Measured already, as by a first try; another try asks nothing.
    with pytest.raises(AuditError):
        run_job(JobConfig.model_validate(settings))
    refused = run(prefect_server, "-m", "glmbatch.cli.main", "run", str(path))
    assert refused.returncode == 1
    assert "nothing published: mood scores 0.0" in refused.stderr
    flow_run = last_flow_run(prefect_server)
    assert flow_run["state_type"] == "FAILED"
    assert "mood scores 0.0" in str(flow_run["state"]["message"])
    tasks = task_runs(prefect_server, 6)
    assert states(tasks, "measure") == {"Completed"}
    assert states(tasks, "publish") == {"Failed"}
    assert not states(tasks, "classify", "write"), "rows of the night were asked"
    shown = artifacts(prefect_server)["annotate"]["data"]
    assert "mood scores 0" in shown and "hardly chance" in shown
    log = "\n".join(log_lines(prefect_server))
    assert "answered by the model" not in log.split("total:")[0], "the second night asked again"
    assert ds.dataset(out, partitioning=None).to_table().column("mood").to_pylist() == answers


def test_a_flow_asks_the_baseline_of_a_training(
    prefect_server: dict[str, str], job_settings: Settings, write_source: Write, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["great food", "awful food"]})
    step = {"kind": "classify", "name": "found"}
    model = exported(parts_of(labelled(240)), sorted(WORDS), tmp_path / "baseline")
    settings = job_settings(model=model, steps=[step])
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(settings))
    done = run(prefect_server, "-m", "glmbatch.cli.main", "run", str(file))
    assert done.returncode == 0, done.stderr
    flow = last_flow_run(prefect_server)
    assert (flow["name"].split()[0], flow["state_name"]) == ("annotate", "Completed")
    rows = rows_of(Path(settings["data"]["output"]))
    assert [row["found"] for row in rows] == ["good", "bad"]
