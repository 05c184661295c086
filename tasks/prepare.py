"""What comes before the first row: the plan, the checkpoints, and a key for each step and fragment.

Weights are loaded by the first task that needs them, once in each process.
"""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.utilities.hashing import hash_objects

from glmbatch.run import canary, models, plan
from glmbatch.run.work import Model, Run, Work
from glmbatch.settings.job import JobConfig, ModelConfig, RuntimeConfig
from tasks.cluster import Place
from tasks.policies import RESULTS_VERSION, machine_failed
from tasks.results import SealedResult


@task(
    name="ingest",
    task_run_name="ingest {job.data.input}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def ingest(job: JobConfig) -> Run:
    """Discover and check the files, and cut them into fragments."""
    canary.check_canary_file(job)  # a wrong file would else be found when all is answered
    return plan.plan_run(job)


def checkpoint_key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """Key of a located checkpoint: its files and its adapter's with size and time of change."""
    model: ModelConfig = parameters["model"]
    # Sizes and times, not digests, which are what the cached task takes.
    stamp = models.stamp_checkpoint(model)
    return hash_objects("checkpoint", RESULTS_VERSION, model.model_dump_json(), stamp)


@task(
    name="locate model",
    task_run_name="locate {model.path}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def locate_model(model: ModelConfig, runtime: RuntimeConfig, place: Place) -> ModelConfig:
    """Make the checkpoint a directory, and settle the dtype for the device at `place`."""
    return place.call(models.locate_model, model, runtime)


@task(
    name="prepare model",
    task_run_name="prepare {model.path}",
    cache_key_fn=checkpoint_key,
    persist_result=True,  # digests of 12 GB take a minute, each night
    result_serializer=SealedResult(),
    retry_condition_fn=machine_failed,
)
def prepare_model(model: ModelConfig) -> Model:
    """Check the checkpoint and digest it."""
    return models.prepare_model(model)


@task(
    name="assign",
    task_run_name="assign {job.data.input}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def assign(job: JobConfig, run: Run, models: list[Model], place: Place) -> Work:
    """Give each step of each fragment its question and key; memory is measured at `place`."""
    return place.call(plan.assign, job, run, models)
