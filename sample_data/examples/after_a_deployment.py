"""A flow that runs a deployment, waits for it, and goes on with its answers. Needs `make up`. From the root:

PREFECT_API_URL=http://127.0.0.1:4200/api python sample_data/examples/after_a_deployment.py annotate/nightly
"""

import sys

import pyarrow.dataset as ds
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import raise_state_exception


@flow(flow_run_name="after {deployment}")
def after(deployment: str) -> int:
    """Count the rows that a run of `deployment` published; a run that failed makes this one fail."""
    run: FlowRun = run_deployment(deployment)  # type: ignore[assignment]  # awaitable in async flows only
    assert run.state is not None  # run_deployment returns when the run has ended
    raise_state_exception(run.state)
    output = run.parameters["job"]["data"]["output"]
    # Where the folder names hold days, `partitioning=None` keeps them from becoming columns.
    rows: int = ds.dataset(output, partitioning=None).count_rows()
    return rows


if __name__ == "__main__":
    print(after(sys.argv[1]), "rows")
