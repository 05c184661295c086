"""Fine-tuning: labelled rows to a checkpoint that `annotate` uses, promoted only if it is better."""

from __future__ import annotations

from prefect import flow

from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.finetune import Report
from tasks import finetune as tasks
from tasks.policies import retried


@flow(name="finetune", flow_run_name="finetune {config.data.input}")
def finetune(config: TuneConfig) -> Report:
    """Train, evaluate, promote; the report, whether it was promoted or not."""
    runtime = config.runtime
    folder = retried(tasks.begin, runtime)(config)
    retried(tasks.train, runtime)(config, folder)
    scored = retried(tasks.evaluate, runtime)(config, folder)
    report: Report = retried(tasks.promote, runtime)(config, scored)
    return report
