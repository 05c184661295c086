"""How tasks are retried, cached and kept in a window; the work itself is in `glmbatch`.

Retried: TransientError alone, with exponential delay and jitter. Cached: under keys made of identities (step, weights,
rows), never by hashing data, with the small receipt as the result and the data in files of the output. A task whose
file is gone or damaged runs again, whatever the cache says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.tasks import exponential_backoff

from glmbatch.errors import TransientError
from glmbatch.glm.engine.pool import POOL
from glmbatch.ledger.ledger import RESULTS
from glmbatch.run.planning import Assignment
from glmbatch.settings.job import JobConfig, RuntimeConfig
from glmbatch.store.paths import is_remote

Item = TypeVar("Item")
Seat = TypeVar("Seat")


def machine_failed(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task is worth another try."""
    return isinstance(state.result(raise_on_failure=False), TransientError)


def configured(task: Task[..., Any], job: JobConfig, *, refresh: bool = False) -> Any:
    """`task` with the job's retries, its results kept in the job's output; `refresh` runs it even when cached.

    Of an output in an object store they are kept where Prefect keeps results: the ledger alone says what is done.
    Typed Any because Prefect takes futures and quoted values where the task itself takes plain ones.
    """
    task = retried(task, job.runtime).with_options(refresh_cache=refresh)
    if is_remote(job.data.output):
        return task
    return task.with_options(result_storage=Path(job.data.output).resolve() / RESULTS)


def retried(task: Task[..., Any], runtime: RuntimeConfig) -> Any:
    """`task` with the retries that the settings say."""
    return task.with_options(
        retries=runtime.retries,
        retry_delay_seconds=exponential_backoff(runtime.retry_delay_seconds)(runtime.retries),
        retry_jitter_factor=0.5,
    )


def in_window(
    items: Iterable[Item],
    submit: Callable[[Item, Seat], Sequence[PrefectFuture[Any]]],
    seats: Iterable[Seat],
    ended: Callable[[Item, Seat, list[Any]], None],
) -> list[list[Any]]:
    """Submit the tasks of each item once one of `seats` is free, which it has until the last of them has ended.

    Gives the results of each item in order, and to `ended` as they come. The first failure is raised at once, with the
    error that the task itself raised. Whatever ends the wait (a failure, an interrupt, a cancellation) ends the
    inference under way in this process, which nobody needs any more.
    """
    results: dict[int, list[Any]] = {}
    free = deque(seats)
    under_way: dict[int, tuple[Item, Seat, Sequence[PrefectFuture[Any]]]] = {}
    ends: SimpleQueue[int] = SimpleQueue()

    def tell_end_of(number: int) -> Callable[[PrefectFuture[Any]], None]:
        return lambda _: ends.put(number)

    def collect() -> None:
        number = ends.get()
        item, seat, futures = under_way.pop(number)
        results[number] = [future.result() for future in futures]
        free.append(seat)
        ended(item, seat, results[number])

    try:
        for number, item in enumerate(items):
            if not free:
                collect()
            seat = free.popleft()
            futures = submit(item, seat)
            under_way[number] = item, seat, futures
            futures[-1].add_done_callback(tell_end_of(number))
        while under_way:
            collect()
    except BaseException:
        POOL.stop()
        raise
    return [results[number] for number in sorted(results)]


def answers_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Key of the answers of one step over one fragment."""
    assignment: Assignment = parameters["assignment"]
    return f"answers-{assignment.key}"
