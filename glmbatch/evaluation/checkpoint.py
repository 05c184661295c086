"""A job that asks a checkpoint what it was trained on, so that it is evaluated as jobs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glmbatch.errors import InputError
from glmbatch.run.models import locate_model, prepare_model
from glmbatch.run.work import Model
from glmbatch.settings.job import GenerateStep, ModelConfig, RuntimeConfig
from glmbatch.settings.tuning import LabelledData, TuneConfig
from glmbatch.store.frames import WHERE
from glmbatch.tuning.encode import step_of
from glmbatch.tuning.examples import TEXT_ALONE
from glmbatch.tuning.report import read_report


def job_of_checkpoint(
    model: str,
    *,
    text_column: str | None = None,
    truth_column: str | None = None,
    prompt_template: str | None = None,
    device: str = "auto",
) -> tuple[dict[str, Any], dict[str, str]]:
    """The job of the checkpoint in directory `model`, and the column with the truth of its step.

    The step and the columns are those of its training, if the folder above has its report.
    InputError if it has neither a trained head nor such a report.
    """
    report = read_report(Path(model).resolve().parent)
    runtime = RuntimeConfig(device=device)
    prepared = prepare_model(locate_model(ModelConfig(path=model), runtime))
    if report is None:
        if not prepared.has_head:
            raise InputError(
                f"{model}: has no trained head. Give a job, or a checkpoint that `glmbatch train` "
                "made."
            )
        data = LabelledData(input=WHERE)
        training = TuneConfig(data=data, output=".", model=ModelConfig(path=model))
        settings = training.model_dump() | {"prompt_template": TEXT_ALONE}
    else:
        settings = report.settings
    if prompt_template is not None:
        settings = settings | {"prompt_template": prompt_template}
    step = step_of(settings, several=prepared.predicts == "labels")
    trained_on = settings["data"]
    if truth_column is None:
        writes = isinstance(step, GenerateStep)
        response = trained_on.get("response_column") if writes else None
        truth_column = response or trained_on["label_column"]
    job = {
        "data": {"text_column": text_column or trained_on["text_column"]},
        "model": model,
        "steps": [step.model_dump() | _changes(prepared)],
        "runtime": {"device": device},
    }
    return job, {step.name: truth_column}


def _changes(model: Model) -> dict[str, Any]:
    """What the step of the training does not say about `model`."""
    if model.predicts == "number":
        return {"number": True}
    if model.is_tfidf:  # it lies beside the checkpoint, but reads the whole text alone
        asked = dict.fromkeys(("system_prompt", "chat", "max_input_tokens"))
        return {"prompt_template": TEXT_ALONE, **asked}
    return {}
