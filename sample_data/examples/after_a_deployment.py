"""A flow that runs a deployment, waits for it, and continues with its answers.

After `make up`, with the variables that it prints, from the root of the repository:

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
    """Count the rows that a run of `deployment` published; if it failed, so does this run."""
    # Outside of async flows it returns the run itself, once that has ended.
    run: FlowRun = run_deployment(deployment)  # type: ignore[assignment]
    assert run.state is not None
    raise_state_exception(run.state)
    output = run.parameters["job"]["data"]["output"]
    # Where the folder names hold days, `partitioning=None` keeps them from becoming columns.
    rows: int = ds.dataset(output, partitioning=None).count_rows()
    return rows


if __name__ == "__main__":
    print(after(sys.argv[1]), "rows")
