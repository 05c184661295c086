"""A session owns the state of one run; runs in one process do not disturb each other."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import InputError, Interrupted
from glmbatch.run.answer import answer
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import assign, plan_run
from glmbatch.run.session import newest_progress, session, session_of
from glmbatch.run.work import Assignment, Run
from glmbatch.settings.job import JobConfig
from tests.support import GENERATE, Settings, Write

LONG = {**GENERATE, "prompt_template": "{text}", "max_tokens": 400}


@pytest.fixture
def planned(write_source: Write, job_settings: Settings, tmp_path: Path) -> Any:
    """A planned run over its own rows, and its only assignment."""

    def plan(name: str, rows: int) -> tuple[Run, Assignment]:
        texts = [f"{name} {number}" for number in range(rows)]
        write_source(f"{name}/a.parquet", {"text": texts})
        settings = job_settings(
            data__input=str(tmp_path / "in" / name),
            data__output=str(tmp_path / name),
            data__rows_per_fragment=rows,
            steps=[LONG],
        )
        job = JobConfig.model_validate(settings)
        run = plan_run(job)
        work = assign(job, run, prepare_models(job))
        return run, work.bundles[0].assignments[0]

    return plan


def in_a_thread(assignment: Assignment) -> Future[Any]:
    return ThreadPoolExecutor(1).submit(answer, assignment)


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_stopping_a_run_does_not_stop_another_one(planned: Any) -> None:
    """Both runs ask the same loaded engine at the same time."""
    stopped_run, stopped_work = planned("stopped", 400)
    other_run, other_work = planned("other", 12)
    with session(stopped_run) as stopped, session(other_run) as other:
        stopped_answers = in_a_thread(stopped_work)
        wait_until(lambda: stopped.progress.snapshot().computed)
        other_answers = in_a_thread(other_work)
        wait_until(lambda: other.progress.snapshot().computed)
        stopped.stop()
        with pytest.raises(Interrupted, match="was stopped"):
            stopped_answers.result(timeout=60)
        assert other_answers.result(timeout=60)[0].computed_rows == 12


def test_a_new_run_does_not_revive_a_stopped_one(planned: Any) -> None:
    stopped_run, stopped_work = planned("stopped", 2)
    other_run, other_work = planned("other", 2)
    with session(stopped_run) as stopped:
        stopped.stop()
        with session(other_run):
            assert answer(other_work)[0].computed_rows == 2
            with pytest.raises(Interrupted, match="was stopped"):
                answer(stopped_work)


def test_a_block_that_fails_stops_inference(planned: Any) -> None:
    run, work = planned("stopped", 400)
    with pytest.raises(KeyboardInterrupt), session(run) as opened:
        answers = in_a_thread(work)
        wait_until(lambda: opened.progress.snapshot().computed)
        raise KeyboardInterrupt
    with pytest.raises(Interrupted):
        answers.result(timeout=60)


def test_a_task_that_outlives_its_run_is_interrupted(planned: Any) -> None:
    run, work = planned("late", 2)
    with session(run) as opened:
        assert session_of(run.context) is opened
    with pytest.raises(Interrupted, match="has ended"):
        answer(work)


def test_files_of_one_name_in_two_folders_are_both_read(planned: Any) -> None:
    run, work = planned("one", 1)
    fragment = work.fragments[0]
    other = fragment.model_copy(update={"path": "/elsewhere/a.parquet"})
    with session(run) as opened:
        assert opened.read_once(fragment, lambda: "rows") == "rows"
        assert opened.read_once(fragment, lambda: "rows") is None
        assert opened.read_once(other, lambda: "other rows") == "other rows"


def test_each_stage_is_logged_from_its_start(planned: Any) -> None:
    with session(planned("one", 1)[0]) as opened:
        before = opened.log
        opened.start("measure", 10)
        assert opened.log is not before and opened.progress.snapshot().total == 10


def test_a_session_holds_its_output_until_it_ends(planned: Any) -> None:
    run, _ = planned("held", 2)
    other, _ = planned("held", 2)
    with session(run):
        with pytest.raises(InputError, match="another run of this process"):
            session(other).__enter__()
        assert newest_progress().total == 2
    with session(other):
        assert newest_progress().total == 2
    assert newest_progress().total == 0
