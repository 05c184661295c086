"""The steps of a fine-tuning. They pass on the run's folder; each task reads the rows itself."""

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
    """Read and audit the labelled rows, and make the run's folder; its path."""
    return tuning.begin(config)


@task(
    name="train",
    task_run_name="train {folder}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def train(config: TuneConfig, folder: str) -> int:
    """Train, or resume a killed training; the number of steps."""
    return int(tuning.train_run(config, folder)["steps"])


@task(
    name="evaluate",
    task_run_name="evaluate {folder}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def evaluate(config: TuneConfig, folder: str) -> Report:
    """Score the result on held-out rows, next to the current checkpoint and a baseline."""
    return tuning.evaluate_run(config, folder)


@task(
    name="promote",
    task_run_name="promote {report.run}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def promote(config: TuneConfig, report: Report) -> Report:
    """Show the report on the run's page, and make the checkpoint current if it is better."""
    create_markdown_artifact(card(report), key="finetune", description=report.reason)
    return tuning.promote(config, report)
