"""What `deployments/prefect.yaml` has triggered by runs that failed, crashed, or published nothing."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from prefect import flow
from pydantic import Field

from tasks import upkeep as tasks


@flow(name="notify", flow_run_name="notify {event}")
def notify(event: str, run: str, message: str, block: str | None = None) -> str:
    """Tell of an event of a run: in PREFECT_HOME/alerts.log, and through a Prefect notification block.

    Args:
        event: Name of the event.
        run: Name of the run.
        message: What it says of itself.
        block: A notification block of this server as TYPE/NAME, such as slack-webhook/data-team; empty: the log alone.
    """
    return tasks.tell(event, run, message, block)


@flow(name="resume", flow_run_name="resume {run}")
def resume(run: UUID, most_attempts: Annotated[int, Field(ge=1, le=20)] = 3) -> bool:
    """Begin a crashed run of a deployment again, with its own parameters; it goes on from what is committed.

    Args:
        run: Id of the run.
        most_attempts: So often in all; a run that brings its machine down is not begun for ever.
    """
    return tasks.begin_again(run, most_attempts)
