"""Find the checkpoints and check them. Weights are loaded by the first task that needs them, once in each process."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.utilities.hashing import hash_objects

from glmbatch.run import planning
from glmbatch.settings.job import ModelConfig, RuntimeConfig
from tasks.cluster import call
from tasks.policies import machine_failed


def checkpoint_key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """Key of a located checkpoint: each file of it and its adapter with size and times; a changed file is a miss."""
    model: ModelConfig = parameters["model"]
    return hash_objects("checkpoint", 1, model.model_dump_json(), planning.stamp_checkpoint(model))


@task(
    name="locate model",
    task_run_name="locate {model.path}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def locate_model(model: ModelConfig, runtime: RuntimeConfig, engine: Any) -> ModelConfig:
    """Make the checkpoint a directory, and settle the numbers that the device of `engine` computes in."""
    return call(engine, planning.locate_model, model, runtime)


@task(
    name="prepare model",
    task_run_name="prepare {model.path}",
    cache_key_fn=checkpoint_key,
    persist_result=True,
    result_serializer="json",
    retry_condition_fn=machine_failed,
)
def prepare_model(model: ModelConfig) -> planning.Model:
    """Check the checkpoint and take its digests."""
    return planning.prepare_model(model)
