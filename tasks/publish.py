"""The tasks that write output files, check the canary, and publish the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.events import emit_event

from glmbatch.errors import AuditError
from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.ledger.rowkeys import bundle_key
from glmbatch.report.counts import Audit, Proofs
from glmbatch.report.summary import Summary
from glmbatch.run import publish as run_publish
from glmbatch.run import write as run_write
from glmbatch.run.canary import check_canary as check
from glmbatch.run.session import ledger_of
from glmbatch.run.work import Bundle, Question, Run, RunContext
from glmbatch.settings.job import CanaryConfig, JobConfig
from tasks.artifacts import show_report
from tasks.cluster import Place
from tasks.policies import RESULTS_VERSION, machine_failed
from tasks.results import SealedResult


def output_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Cache key of the output files of a bundle."""
    bundle: Bundle = parameters["bundle"]
    return f"output-{RESULTS_VERSION}-{bundle_key(bundle.output_keys)}"


@task(
    name="write",
    task_run_name="write {bundle.name}",
    cache_key_fn=output_key,
    persist_result=True,  # the receipts; the files are staged in the output
    result_serializer=SealedResult(),
    retry_condition_fn=machine_failed,
)
def write(bundle: Bundle, answers: list[list[AnswersReceipt]]) -> list[OutputReceipt]:
    """Stage the output file of each fragment: its rows with their answers. Returns the receipts."""
    return run_write.write_outputs(bundle, answers, ledger_of(bundle.run))


@task(
    name="check canary",
    task_run_name="check canary {canary.file}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def check_canary(
    canary: CanaryConfig, questions: Sequence[Question], run: RunContext, place: Place
) -> list[Audit]:
    """Answer the canary rows with the models loaded at `place`; the resulting audits."""
    return place.call(check, canary, questions, run)


@task(
    name="publish",
    task_run_name="publish {job.data.output}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def publish(
    job: JobConfig,
    run: Run,
    questions: Sequence[Question],
    outputs: list[OutputReceipt],
    proofs: Proofs,
) -> Summary:
    """Audit the staged outputs, publish them, and show the report on the flow run's page.

    If an audit fails, raises AuditError and emits the event `glmbatch.audit.failed`.
    """
    output = job.data.output
    try:
        return run_publish.publish(job, run, questions, outputs, proofs)
    except AuditError as error:
        resource = {
            "prefect.resource.id": f"glmbatch.output.{output}",
            "prefect.resource.name": output,
        }
        emit_event("glmbatch.audit.failed", resource=resource, payload={"message": str(error)})
        raise
    finally:
        # A refused run needs its report most.
        show_report(output, run.context.id)
