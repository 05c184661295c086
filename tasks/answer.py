"""The task that answers one step for every row of a bundle, named after the step's kind."""

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
    """Cache key of the answers of one step over one bundle."""
    assignment: Assignment = parameters["assignment"]
    return f"answers-{RESULTS_VERSION}-{assignment.answers_keys.file}"


@task(
    name="answer",
    task_run_name="{assignment.question.step.kind} {assignment.question.name} {assignment.name}",
    cache_key_fn=answers_key,
    persist_result=True,  # the receipts; the answers are in the output's own files
    result_serializer=SealedResult(),
    retry_condition_fn=machine_failed,
)
def answer(
    assignment: Assignment, earlier: Sequence[list[AnswersReceipt]], place: Place
) -> list[AnswersReceipt]:
    """Answer a step for every row of a bundle, at `place`; the receipt of each fragment's answers.

    `earlier` is not used; it makes Prefect wait for the steps that the prompt uses.
    """
    return place.call(answer_assignment, assignment)
