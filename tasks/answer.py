"""The task that answers one step for every row of a fragment, named after the step's kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.context import TaskRunContext

from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.run.answer import answer as answer_assignment
from glmbatch.run.work import Assignment
from tasks.cluster import Place
from tasks.policies import RESULTS_VERSION, machine_failed
from tasks.results import SealedResult


def answers_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Cache key of the answers of one step over one fragment."""
    assignment: Assignment = parameters["assignment"]
    return f"answers-{RESULTS_VERSION}-{assignment.key}"


@task(
    name="answer",
    task_run_name=(
        "{assignment.question.step.kind} {assignment.question.name} {assignment.fragment.name}"
    ),
    cache_key_fn=answers_key,
    persist_result=True,  # the receipt; the answers are in the output's own files
    result_serializer=SealedResult(),
    retry_condition_fn=machine_failed,
)
def answer(
    assignment: Assignment, earlier: Sequence[AnswersReceipt], place: Place
) -> AnswersReceipt:
    """Answer a step for every row of a fragment, at `place`; the receipt of the answers.

    `earlier` is not used; it makes Prefect wait for the steps that the prompt uses.
    """
    return place.call(answer_assignment, assignment)
