"""A flow that runs a deployment, waits for it, and continues with its answers.

Run `make up`, set the variables that it prints, then from the root of the repository:

    python sample_data/examples/after_a_deployment.py annotate/nightly
"""

import sys

import pyarrow.dataset as ds
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import raise_state_exception


@flow(flow_run_name="after {deployment}")
def after(deployment: str) -> int:
    """Run `deployment` and count the rows it published. If its run fails, so does this one."""
    # In a synchronous flow this call waits and returns the finished run.
    run: FlowRun = run_deployment(deployment)  # type: ignore[assignment]
    assert run.state is not None
    raise_state_exception(run.state)
    output = run.parameters["job"]["data"]["output"]
    # `partitioning=None` keeps folder names such as `day=1` from becoming columns.
    rows: int = ds.dataset(output, partitioning=None).count_rows()
    return rows


if __name__ == "__main__":
    print(after(sys.argv[1]), "rows")
