"""The flow of a training: from labelled rows to a checkpoint, promoted if it is better."""

from __future__ import annotations

from prefect import flow

from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.report import Report
from tasks import finetune as tasks
from tasks.page import logged_on_page
from tasks.policies import retried


@flow(name="finetune", flow_run_name="finetune {config.data.input}")
def finetune(config: TuneConfig) -> Report:
    """Train and evaluate a checkpoint, promote it if it is better, and return the report."""
    runtime = config.runtime
    with logged_on_page():
        folder = retried(tasks.begin, runtime)(config)
        retried(tasks.train, runtime)(config, folder)
        scored = retried(tasks.evaluate, runtime)(config, folder)
        report: Report = retried(tasks.promote, runtime)(config, scored)
    return report
