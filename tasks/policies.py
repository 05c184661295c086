"""How tasks are retried and cached. The work itself is in `glmbatch`.

Only TransientError is retried, with exponential delay and jitter. Cache keys are made of identities
(step, weights, rows), never of hashed data. The cached result is the small receipt; the data is in
the output's files. If a file is missing or damaged, the task runs again despite the cache.
"""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import exponential_backoff

from glmbatch.errors import TransientError
from glmbatch.ledger.ledger import Ledger
from glmbatch.settings.job import RuntimeConfig

# Part of every cache key. Raise it when the class of a cached result moves or changes, because
# Prefect stores the name of its module.
RESULTS_VERSION = 4


def machine_failed(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether to retry a failed task."""
    return isinstance(state.result(raise_on_failure=False), TransientError)


def configured(
    task: Task[..., Any], runtime: RuntimeConfig, output: str, *, refresh: bool = False
) -> Any:
    """`task` with the retries of `runtime` and its results stored in `output`.

    `refresh` ignores cached results. For an output in an object store, results stay in Prefect's
    home, and only the ledger decides what is done. Typed Any because Prefect accepts futures and
    quoted values in place of the task's own arguments.
    """
    results = Ledger(output).results_folder()
    task = retried(task, runtime).with_options(refresh_cache=refresh)
    return task if results is None else task.with_options(result_storage=results)


def retried(task: Task[..., Any], runtime: RuntimeConfig) -> Any:
    """`task` with the retries of `runtime`."""
    return task.with_options(
        retries=runtime.retries,
        retry_delay_seconds=exponential_backoff(runtime.retry_delay_seconds)(runtime.retries),
        retry_jitter_factor=0.5,
    )
