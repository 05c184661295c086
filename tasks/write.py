"""Write a fragment's rows with their answers, and publish the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.events import emit_event

from glmbatch.errors import AuditError
from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.report.summary import Summary
from glmbatch.run import canary, pipeline
from glmbatch.run import publish as publishing
from glmbatch.run.audits import Audit
from glmbatch.run.planning import Assignment, FragmentWork, Run
from glmbatch.settings.job import JobConfig
from tasks.artifacts import show_report
from tasks.cluster import call
from tasks.policies import machine_failed


def output_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Key of a fragment's output file."""
    work: FragmentWork = parameters["work"]
    return f"output-{work.key}"


@task(
    name="write",
    task_run_name="write {work.fragment.name}",
    cache_key_fn=output_key,
    persist_result=True,
    result_serializer="json",
    retry_condition_fn=machine_failed,
)
def write(job: JobConfig, work: FragmentWork, answers: list[AnswersReceipt]) -> OutputReceipt:
    """Stage the output file of a fragment."""
    return pipeline.write_output(job, work, answers)


@task(
    name="publish",
    task_run_name="publish {job.data.output}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def publish(
    job: JobConfig, run: Run, outputs: list[OutputReceipt], canaries: list[Audit]
) -> Summary:
    """Audit what is staged, make it public, and say what happened, also when it was refused.

    An audit that fails is an event of the output.
    """
    try:
        return publishing.publish(job, run, outputs, canaries)
    except AuditError as error:
        output = {
            "prefect.resource.id": f"glmbatch.output.{job.data.output}",
            "prefect.resource.name": job.data.output,
        }
        emit_event("glmbatch.audit.failed", resource=output, payload={"message": str(error)})
        raise
    finally:
        show_report(job, run)


@task(
    name="check canary",
    task_run_name="check canary {job.canary.file}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def check_canary(job: JobConfig, assignments: Sequence[Assignment], engine: Any) -> list[Audit]:
    """Ask the models that `engine` has loaded about the frozen rows, and compare."""
    return call(engine, canary.check_canary, job, assignments)
