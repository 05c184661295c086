"""What is done about runs that did not end well: tell somebody, and begin them again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger, task
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_HOME
from prefect.states import Scheduled

from glmbatch.errors import InputError
from glmbatch.store.locks import STALE_SECONDS
from glmbatch.store.paths import is_remote
from tasks.policies import machine_failed

ALERTS = "alerts.log"  # in PREFECT_HOME


@task(name="tell", cache_policy=NO_CACHE, retry_condition_fn=machine_failed)
def tell(event: str, run: str, message: str, block: str | None) -> str:
    """Add a line to the log of alerts, and hand it to the notification block, if there is one; the line."""
    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {event} {run}: {' '.join(message.split())}"
    with (Path(PREFECT_HOME.value()) / ALERTS).open("a", encoding="utf-8") as log:
        log.write(line + "\n")
    if block is not None:
        notification = Block.load(block)
        if not isinstance(notification, NotificationBlock):
            raise InputError(
                f"{block}: sends no notifications. Set block to a block that does, such as slack-webhook/NAME."
            )
        notification.notify(line, subject=f"glmbatch: {event}")  # type: ignore[unused-coroutine]
    return line


@task(name="begin again", cache_policy=NO_CACHE, retry_condition_fn=machine_failed)
def begin_again(run: UUID, most_attempts: int) -> bool:
    """Schedule a crashed run for now, unless it has been begun `most_attempts` times; whether it was."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(run)
        again = (
            found.state is not None and found.state.is_crashed() and found.run_count < most_attempts
        )
        if again:
            # In a store the lock of a process that died holds until it is stale.
            wait = timedelta(
                seconds=STALE_SECONDS + 10 if is_remote(_output(found.parameters)) else 0
            )
            told = f"Attempt {found.run_count + 1} of {most_attempts}."
            client.set_flow_run_state(
                run, Scheduled(scheduled_time=datetime.now(UTC) + wait, message=told)
            )
    get_run_logger().info(
        "%s was begun %s of %s times; again: %s", found.name, found.run_count, most_attempts, again
    )
    return again


def _output(parameters: dict[str, Any]) -> str:
    return str(
        parameters["job"]["data"]["output"]
        if "job" in parameters
        else parameters["config"]["output"]
    )
