"""From the input's files to what is to be done for each fragment."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from glmbatch.run import canary, planning
from glmbatch.settings.job import JobConfig
from tasks.cluster import call
from tasks.policies import machine_failed


@task(
    name="ingest",
    task_run_name="ingest {job.data.input}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def ingest(job: JobConfig) -> planning.Run:
    """Discover and check the files, cut them into fragments, and see that the output can be written."""
    canary.check_file(job)
    run = planning.plan_run(job)
    planning.open_output(job, run)
    return run


@task(
    name="assign",
    task_run_name="assign {job.data.input}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def assign(
    job: JobConfig, run: planning.Run, models: list[planning.Model], engine: Any
) -> planning.Work:
    """Give each step of each fragment its key and its model; `engine` is where it is seen which models fit."""
    return call(engine, planning.assign, job, run, models)
