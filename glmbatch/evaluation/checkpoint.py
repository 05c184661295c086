"""Checkpoints that were trained here: the job that evaluates one, and which rows it learned.

Shapes: R rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from glmbatch.errors import InputError
from glmbatch.glm.files import recorded_prompt
from glmbatch.run.models import locate_model, prepare_model
from glmbatch.run.work import Model, Question
from glmbatch.settings.job import GenerateStep, ModelConfig, RuntimeConfig, placeholders
from glmbatch.settings.tuning import LabelledData, TuneConfig
from glmbatch.steps.prompt import check_value
from glmbatch.store.frames import WHERE
from glmbatch.store.values import is_plain, prompt_values
from glmbatch.tuning.encode import step_of
from glmbatch.tuning.examples import TEXT_ALONE, Example, text_keys
from glmbatch.tuning.report import CHECKPOINT, learned_lists, read_report


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


def learned_rows(question: Question, rows: pa.Table) -> np.ndarray:
    """Which of `rows` have a text that the checkpoint of `question` was trained on.

    None, if it was not trained here, was moved without its list of texts, or reads other columns.
    """
    learned_R = np.zeros(len(rows), bool)
    for path in learned_lists(question.model.config):
        asked = recorded_prompt(str(path.parent / CHECKPOINT), None) or {}
        examples = _as_asked(question, rows, asked.get("prompt_template", TEXT_ALONE))
        learned_R |= np.isin(text_keys(examples), np.load(path))
    return learned_R


def _as_asked(question: Question, rows: pa.Table, template: str) -> list[Example]:
    """The `rows` in the words of `template`, which may have other names for the columns."""
    names, columns = placeholders(template), question.inputs.columns
    known = {name for name in rows.column_names if is_plain(rows[name].type)}
    if len(names) != len(columns) or not known.issuperset(columns.values()):
        return [Example("", "", "")] * len(rows)
    texts = []
    for name, column in columns.items():
        is_text = name in question.inputs.texts
        read = (check_value(name, value, is_text=is_text) for value in prompt_values(rows[column]))
        texts.append([value if isinstance(value, str) else None for value in read])
    examples = []
    for values in zip(*texts, strict=True):
        columns_of_row = dict(zip(names, values, strict=True))
        examples.append(Example("", "", "", columns=columns_of_row).with_template(template))
    return examples
