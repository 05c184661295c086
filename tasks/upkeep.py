"""The tasks that report and restart failed runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from prefect import get_run_logger, task
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_HOME
from prefect.states import Scheduled

from glmbatch.errors import InputError
from glmbatch.settings.job import DataConfig
from glmbatch.store.locks import seconds_until_free
from tasks.policies import machine_failed

ALERTS = "alerts.log"  # in PREFECT_HOME


@task(name="send alert", cache_policy=NO_CACHE, retry_condition_fn=machine_failed)
def send_alert(event: str, run: str, message: str, block: str | None) -> str:
    """Append a line to the alerts log, send it through `block` if given, and return it.

    InputError if `block` cannot send notifications.
    """
    # Always one line per alert, so that the log can be searched.
    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {event} {run}: {' '.join(message.split())}"
    with (Path(PREFECT_HOME.value()) / ALERTS).open("a", encoding="utf-8") as log:
        log.write(line + "\n")
    if block is not None:
        notification = Block.load(block)
        if not isinstance(notification, NotificationBlock):
            raise InputError(
                f"{block}: this block cannot send notifications. "
                "Set block to one that can, such as slack-webhook/NAME."
            )
        notification.notify(line, subject=f"glmbatch: {event}")  # type: ignore[unused-coroutine]
    return line


@task(name="restart", cache_policy=NO_CACHE, retry_condition_fn=machine_failed)
def restart(run: UUID, most_attempts: int) -> bool:
    """Reschedule a crashed run, up to `most_attempts` starts in total; returns whether it was.

    It starts as soon as its output's lock is free.
    """
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(run)
        # An automation may fire twice for one event. The second time, the run is not crashed.
        crashed = flow_run.state is not None and flow_run.state.is_crashed()
        again = crashed and flow_run.run_count < most_attempts
        if again:
            message = f"Attempt {flow_run.run_count + 1} of {most_attempts}."
            start = datetime.now(UTC) + _wait_for_lock(flow_run)
            client.set_flow_run_state(run, Scheduled(scheduled_time=start, message=message))
    get_run_logger().info(
        "%s: started %s of at most %s times; restarted: %s",
        flow_run.name,
        flow_run.run_count,
        most_attempts,
        again,
    )
    return again


def _wait_for_lock(flow_run: FlowRun) -> timedelta:
    """How long the dead process may still hold its output's lock.

    On a disk, the system releases the lock when the process ends; in a store, it must expire.
    """
    return timedelta(seconds=seconds_until_free(_output(flow_run)))


def _output(flow_run: FlowRun) -> str:
    """The output of a run of `annotate` or `finetune`, the two flows that are restarted."""
    parameters = flow_run.parameters
    if "job" in parameters:
        data = DataConfig.model_validate(parameters["job"]["data"])
        return data.dated(flow_run.expected_start_time).output
    return str(parameters["config"]["output"])
