"""The steps of a fine-tuning. Rows are read anew by each task: what is passed on is the run's folder."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning import finetune as tuning
from tasks.policies import machine_failed


@task(
    name="begin",
    task_run_name="begin {config.data.input}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def begin(config: TuneConfig) -> str:
    """Read and audit the labelled rows; the folder of the run."""
    return tuning.begin(config)


@task(
    name="train",
    task_run_name="train {folder}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def train(config: TuneConfig, folder: str) -> int:
    """Train, or go on where a killed run stopped; the steps done."""
    return int(tuning.train_run(config, folder)["steps"])


@task(
    name="evaluate",
    task_run_name="evaluate {folder}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def evaluate(config: TuneConfig, folder: str) -> tuning.Report:
    """Score the result on held-out rows, beside the current checkpoint and a baseline."""
    return tuning.evaluate_run(config, folder)


@task(
    name="promote",
    task_run_name="promote {report.run}",
    cache_policy=NO_CACHE,
    retry_condition_fn=machine_failed,
)
def promote(config: TuneConfig, report: tuning.Report) -> tuning.Report:
    """Make it the current checkpoint, if it is better, and show the report on the run's page."""
    from glmbatch.tuning.report import card

    create_markdown_artifact(card(report), key="finetune", description=report.reason)
    return tuning.promote(config, report)
