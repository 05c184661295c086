"""The tasks before the first row: the plan, the checkpoints, and the keys of steps and fragments.

The first task that needs weights loads them, once per process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.utilities.hashing import hash_objects

from glmbatch.report.counts import Measured
from glmbatch.run import canary, models, plan
from glmbatch.run.promotion import measure as promotion
from glmbatch.run.work import Model, Question, Run, Work
from glmbatch.settings.job import (
    DataConfig,
    EvaluateConfig,
    JobConfig,
    ModelConfig,
    RuntimeConfig,
)
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
    """Find and check the input files, and cut them into fragments."""
    canary.check_canary_file(job)  # otherwise a wrong file would fail the run at its end
    return plan.plan_run(job)


def checkpoint_key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """Cache key of a located checkpoint: the sizes and times of its files and its adapter's."""
    model: ModelConfig = parameters["model"]
    # Not digests, because computing those is the work that the cache saves.
    stamp = models.stamp_checkpoint(model)
    return hash_objects("checkpoint", RESULTS_VERSION, model.model_dump_json(), stamp)


@task(
    name="locate model",
    task_run_name="locate {model.path}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def locate_model(model: ModelConfig, runtime: RuntimeConfig, place: Place) -> ModelConfig:
    """Download the checkpoint if needed, and choose the dtype for the device at `place`.

    The result's path is a local directory.
    """
    return place.call(models.locate_model, model, runtime)


@task(
    name="prepare model",
    task_run_name="prepare {model.path}",
    cache_key_fn=checkpoint_key,
    persist_result=True,  # digesting 12 GB takes a minute
    result_serializer=SealedResult(),
    retry_condition_fn=machine_failed,
)
def prepare_model(model: ModelConfig) -> Model:
    """Check the checkpoint and compute its digest."""
    return models.prepare_model(model)


@task(
    name="assign",
    task_run_name="assign {job.data.input}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def assign(job: JobConfig, run: Run, models: list[Model], place: Place, engines: int) -> Work:
    """The work of each bundle: question and step key of each step. Measures memory at `place`."""
    return place.call(plan.assign, job, run, models, engines)


@task(
    name="measure",
    task_run_name="measure on {config.rows}",
    cache_policy=NO_CACHE,  # the output keeps the scores
    retry_condition_fn=machine_failed,
)
def measure(
    config: EvaluateConfig, data: DataConfig, run: Run, questions: Sequence[Question], place: Place
) -> tuple[Measured, ...]:
    """Measure the changed steps on labelled rows at `place`; a retry asks no row again."""
    return place.call(promotion.measure_changes, config, data, run, questions)
