"""An example of a flow of your own that has a deployment's answers made before it goes on with them."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import raise_state_exception


@flow(name="downstream", flow_run_name="after {deployment}")
def downstream(deployment: str = "annotate/nightly") -> str:
    """Run the deployment as a child of this run, on its own worker; the folder of its answers, or its failure."""
    run: FlowRun = run_deployment(deployment)  # type: ignore[assignment]  # a coroutine only inside of one
    assert run.state is not None
    raise_state_exception(run.state)
    return str(run.parameters["job"]["data"]["output"])
