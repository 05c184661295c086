"""The tasks of a training. They pass the run's folder to each other, and each reads the rows."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning import finetune as tuning
from glmbatch.tuning.render import card
from glmbatch.tuning.report import Report
from tasks.policies import machine_failed


@task(
    name="begin",
    task_run_name="begin {config.data.input}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def begin(config: TuneConfig) -> str:
    """Read and audit the labelled rows and create the run's folder; returns its path."""
    return tuning.begin(config)


@task(
    name="train",
    task_run_name="train {folder}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def train(config: TuneConfig, folder: str) -> int:
    """Train, or resume a killed training; returns the number of optimizer steps."""
    return int(tuning.train_run(config, folder)["steps"])


@task(
    name="evaluate",
    task_run_name="evaluate {folder}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def evaluate(config: TuneConfig, folder: str) -> Report:
    """Score the result on held-out rows, along with the current checkpoint and a baseline."""
    return tuning.evaluate_run(config, folder)


@task(
    name="promote",
    task_run_name="promote {report.run}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def promote(config: TuneConfig, report: Report) -> Report:
    """Promote the checkpoint if it is better, and show the report on the flow run's page."""
    # Promotion may compare again, so the card comes after it.
    decided = tuning.promote(config, report)
    create_markdown_artifact(card(decided), key="finetune", description=decided.reason)
    return decided
