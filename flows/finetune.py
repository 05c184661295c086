"""Fine-tuning: labelled rows to a checkpoint that `annotate` uses, promoted only if it is better."""

from __future__ import annotations

from typing import Any

from prefect import flow

from glmbatch.tuning.config import TuneConfig
from glmbatch.tuning.finetune import Report
from tasks import finetune as tasks


@flow(name="finetune", flow_run_name="finetune {config.data.input}")
def finetune(config: TuneConfig) -> Report:
    """Train, evaluate, promote; the report, whether it was promoted or not."""
    retries: dict[str, Any] = {
        "retries": config.runtime.retries,
        "retry_delay_seconds": config.runtime.retry_delay_seconds,
    }
    folder = tasks.begin.with_options(**retries)(config)
    tasks.train.with_options(**retries)(config, folder)
    report = tasks.evaluate.with_options(**retries)(config, folder)
    return tasks.promote.with_options(**retries)(config, report)
