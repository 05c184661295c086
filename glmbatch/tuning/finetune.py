"""Read this first: a training from labelled rows to a promoted checkpoint, in plain calls.

    begin     examples, split      read and audit the rows; choose the run's folder
    train     train, trainer       token ids to trained weights, in one or several processes
    evaluate  evaluate, baseline   score on held-out rows, through the job that will use it
    promote   promote              make it the current checkpoint if it is better

    OUTPUT/runs/<id>/checkpoint/   the new checkpoint, in the published layout
    OUTPUT/runs/<id>/adapter/      with LoRA: the adapter that was merged into it
    OUTPUT/runs/<id>/baseline/     TF-IDF as a model that a job can use instead
    OUTPUT/runs/<id>/report.html   for people; report.json and the model card have the same facts
    OUTPUT/runs/<id>/trainer/      what a killed training resumes from
    OUTPUT/current -> runs/<id>    the promoted run; jobs use OUTPUT/current/checkpoint

A run's id is a digest of its settings, rows and base. Started again, a run resumes or is already
done.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from glmbatch.errors import InputError
from glmbatch.report.progress import Snapshot
from glmbatch.run.models import locate_model, prepare_model
from glmbatch.run.session import newest_progress as newest_answers
from glmbatch.settings.job import placeholders
from glmbatch.settings.tuning import LORA_TARGETS, TuneConfig
from glmbatch.store.files import writable
from glmbatch.store.locks import exclusive
from glmbatch.tuning.encode import template_of
from glmbatch.tuning.evaluate import score_run
from glmbatch.tuning.examples import TEXT_ALONE
from glmbatch.tuning.processes import train_together
from glmbatch.tuning.promote import current_run, decide, make_current, prune, template_of_current
from glmbatch.tuning.render import write_report
from glmbatch.tuning.report import (
    PROGRESS,
    RUNS,
    TRAINED,
    TRAINER,
    Report,
    TrainingPlan,
    read_report,
)
from glmbatch.tuning.split import Labelled, read_labelled, with_metric

# The folders of the runs that are being trained in this process.
_TRAINING: list[Path] = []
# Settings of the result's place, of speed and of the promotion do not make another run.
UNIDENTIFIED = {"output", "runtime", "must_beat", "least_test_rows", "keep_runs"}


def finetune(config: TuneConfig) -> Report:
    """Train and evaluate, promote if better, and return the report.

    InputError if rows or settings cannot be used.
    """
    run = begin(config)
    train_run(config, run)
    return promote(config, evaluate_run(config, run))


def check(config: TuneConfig) -> None:
    """Check packages, rows and model before the run begins. InputError if one is wrong."""
    for package in ("accelerate", "peft", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"training needs {package}, which is not installed. "
                "Run pip install 'glmbatch[train]'."
            )
    if Path(config.output).is_file():
        raise InputError(f"{config.output}: is a file where a folder is expected. Set output.")
    template = config.prompt_template or TEXT_ALONE
    # A hub id may need the network, whose errors the flow retries.
    if config.model.revision is None:
        locate_model(config.model, config.runtime)
        template = template_of(config)
    also = placeholders(template_of_current(config.output) or template)
    with_metric(config, read_labelled(config.data, template, also))


def begin(config: TuneConfig) -> str:
    """Create the run's folder and return its path. The same run always has the same folder."""
    labelled = read_labelled(config.data, template_of(config))
    with_metric(config, labelled)  # refuses one that cannot score these rows
    run = _folder(config, labelled)
    with writable(run, "output"):
        run.mkdir(parents=True, exist_ok=True)
    return str(run)


def _folder(config: TuneConfig, labelled: Labelled) -> Path:
    base = _checked_base(config)
    settings = config.model_dump(mode="json", exclude=UNIDENTIFIED)
    if config.prompt_template is not None:  # the text column has two names in it
        settings["prompt_template"] = template_of(config)
    # So that trainings keep their ids from before these settings existed.
    if config.chat is None:
        del settings["chat"]
    if config.training.distill is None:
        del settings["training"]["distill"]
    if config.training.lora_targets == LORA_TARGETS:
        del settings["training"]["lora_targets"]
    facts = json.dumps([settings, dict(labelled.audit.files), base], sort_keys=True)
    return Path(config.output) / RUNS / hashlib.sha256(facts.encode()).hexdigest()[:16]


def _checked_base(config: TuneConfig) -> str:
    """The identity of the model to train. InputError if it cannot be trained."""
    base = prepare_model(locate_model(config.model, config.runtime))
    if base.is_tfidf:
        raise InputError(
            f"{config.model.path}: is TF-IDF, which cannot be trained further. Set model to a "
            "checkpoint."
        )
    return base.identity


def preview(config: TuneConfig) -> TrainingPlan:
    """What a training would do, without loading or writing a weight. InputError as for it."""
    check(config)
    from glmbatch.tuning.train import plan_training

    labelled = read_labelled(config.data, template_of(config))
    run = _folder(config, labelled)
    current = current_run(config.output)
    planned = plan_training(config, labelled)
    return planned.model_copy(
        update={
            "run": str(run),
            "is_trained": (run / TRAINED).is_file(),
            "current": None if current is None else current.name,
        }
    )


def _train(config: TuneConfig, run: Path) -> None:
    if config.training.processes > 1:
        train_together(config, run)
        return
    # Imported here, because it loads torch, which importing the flow must not.
    from glmbatch.tuning.train import train_here

    train_here(config, run)


def train_run(config: TuneConfig, folder: str) -> dict[str, Any]:
    """Train, unless that is already done; returns the fields of `Trained`."""
    run = Path(folder)
    trained = run / TRAINED
    if not trained.is_file():
        (run / TRAINER / PROGRESS).unlink(missing_ok=True)  # of a killed training
        _TRAINING.append(run)
        try:
            _train(config, run)
        finally:
            _TRAINING.remove(run)
    # Optimizer states take several times the size of the model.
    shutil.rmtree(run / TRAINER, ignore_errors=True)
    summary: dict[str, Any] = json.loads(trained.read_text(encoding="utf-8"))
    return summary


def newest_progress() -> Snapshot:
    """The steps of the training in this process, or the answers that it is scored on."""
    run = _TRAINING[-1] if _TRAINING else None
    if run is None:
        return newest_answers()
    try:
        counts = json.loads((run / TRAINER / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no step is taken yet
        return Snapshot("loading", 0, 0, 0, 0.0, unit="steps")
    return Snapshot(stage="training", unit="steps", **counts)


def evaluate_run(config: TuneConfig, folder: str) -> Report:
    """Score the run and those that it must beat; write and return the run's report.

    The report says whether to promote the run. A run that is promoted, or was already compared with
    the current checkpoint, is not scored again.
    """
    run = Path(folder)
    current = current_run(config.output)
    report = read_report(run)
    if report is not None and current == run.resolve():  # do not compare it with itself
        return report
    compared = None if current is None else current.name
    # Reports of earlier versions compare nothing.
    if report is None or report.compared_with != compared or not report.comparisons:
        report = score_run(config, run, current)
    report = decide(report, config.must_beat, config.least_test_rows)
    write_report(report, run)
    return report


def promote(config: TuneConfig, report: Report) -> Report:
    """Make the run of `report` the current one if its report says so, and return the report.

    If another run was promoted since the evaluation, this run is compared with that one first.
    """
    output = Path(config.output)
    # One promotion at a time. The system releases the lock of a process that dies.
    with exclusive(output / ".lock"):
        current = current_run(config.output)
        compared = None if current is None else current.name
        if compared not in (report.compared_with, report.run):
            report = evaluate_run(config, str(output / RUNS / report.run))
        if report.promoted:
            make_current(output, report.run)
        if config.keep_runs is not None:
            prune(output, config.keep_runs)
    return report
