"""How tasks are retried and cached; the work itself is in `glmbatch`.

Retried: TransientError alone, with exponential delay and jitter. Cached: under keys made of
identities (step, weights, rows), never by hashing data, with the small receipt as the result and
the data in files of the output. A task whose file is gone or damaged runs again, whatever the cache
says.
"""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import exponential_backoff

from glmbatch.errors import TransientError
from glmbatch.ledger.ledger import Ledger
from glmbatch.settings.job import RuntimeConfig

# Part of every cache key. Raise it when the class of a cached result moves or changes: Prefect
# finds the class by the module's name that it stored.
RESULTS_VERSION = 3


def machine_failed(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task is worth another try."""
    return isinstance(state.result(raise_on_failure=False), TransientError)


def configured(
    task: Task[..., Any], runtime: RuntimeConfig, output: str, *, refresh: bool = False
) -> Any:
    """`task` with its retries, its results in `output`; `refresh` ignores cached ones.

    For an output in an object store, results stay where Prefect keeps them: the ledger alone says
    what is done. Typed Any because Prefect takes futures and quoted values where the task itself
    takes plain ones.
    """
    results = Ledger(output).results_folder()
    task = retried(task, runtime).with_options(refresh_cache=refresh)
    return task if results is None else task.with_options(result_storage=results)


def retried(task: Task[..., Any], runtime: RuntimeConfig) -> Any:
    """`task` with the retries that the settings ask for."""
    return task.with_options(
        retries=runtime.retries,
        retry_delay_seconds=exponential_backoff(runtime.retry_delay_seconds)(runtime.retries),
        retry_jitter_factor=0.5,
    )
