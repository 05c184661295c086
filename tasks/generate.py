"""Write a text for every row of a fragment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task

from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.run import pipeline
from glmbatch.run.planning import Assignment
from glmbatch.settings.job import JobConfig
from tasks.cluster import call
from tasks.policies import answers_key, machine_failed


@task(
    name="generate",
    task_run_name="generate {assignment.step} {assignment.fragment.name}",
    cache_key_fn=answers_key,
    persist_result=True,
    result_serializer="json",
    retry_condition_fn=machine_failed,
)
def generate(
    job: JobConfig, assignment: Assignment, earlier: Sequence[AnswersReceipt], engine: Any
) -> AnswersReceipt:
    """Write a text for every row of a fragment, after the `earlier` steps, in the process of `engine`."""
    return call(engine, pipeline.answer, job, assignment)
