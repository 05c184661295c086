"""Run the sample's job as a subflow of your own Prefect flow, then use the published answers.

From the root of the repository:

    python sample_data/examples/in_a_flow.py OUTPUT
"""

import sys

import pandas as pd
from prefect import flow, task

from flows.annotate import annotate
from glmbatch.settings.jobfile import load_job


@task
def count_by_product(output: str) -> dict[str, int]:
    """Count the published negative reviews of each product."""
    answers = pd.read_parquet(output, columns=["product", "sentiment"])
    negative = answers[answers["sentiment"] == "negative"]
    return {str(product): int(rows) for product, rows in negative["product"].value_counts().items()}


@flow
def complaints(output: str, limit: int | None = None) -> dict[str, int]:
    """Answer the reviews, then count the complaints."""
    job = load_job("sample_data/reviews.yaml", {"data.output": output, "data.limit": limit})
    summary = annotate(job)  # a subflow with its own retries, cache and audits
    print(f"{summary.rows} rows, {summary.faulty_rows} failed")
    return count_by_product(summary.output)


if __name__ == "__main__":
    print(complaints(sys.argv[1], limit=60))
