"""The flows that `deployments/prefect.yaml` starts when a run fails, crashes or is refused."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from prefect import flow
from pydantic import Field

from tasks import upkeep as tasks


@flow(name="notify", flow_run_name="notify {event}")
def notify(event: str, run: str, message: str, block: str | None = None) -> str:
    """Report an event of a run in PREFECT_HOME/alerts.log and through a notification block.

    Returns the line in the log.

    Args:
        event: Name of the event.
        run: Name of the run.
        message: The message of the event.
        block: Notification block on this server as TYPE/NAME, such as slack-webhook/data-team.
            Empty: only the log.
    """
    return tasks.send_alert(event, run, message, block)


@flow(name="resume", flow_run_name="resume {run}")
def resume(run: UUID, most_attempts: Annotated[int, Field(strict=True, ge=1, le=20)] = 3) -> bool:
    """Restart a crashed run of a deployment with the same parameters; committed work is reused.

    Returns whether it was restarted.

    Args:
        run: Id of the run.
        most_attempts: Maximum number of starts, so that a run that kills its machine does not
            restart for ever.
    """
    return tasks.restart(run, most_attempts)
