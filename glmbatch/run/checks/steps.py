"""Whether a checked model can answer a step, and what the step takes from its training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from glmbatch.errors import InputError, some_of
from glmbatch.glm.checkpoint.config_check import Predicts
from glmbatch.glm.files import recorded_prompt
from glmbatch.run.models import describe_model, tokenizer_of
from glmbatch.run.work import Model
from glmbatch.settings.job import (
    AnyStep,
    ClassifyStep,
    ExtractStep,
    GenerateStep,
    Step,
    differ_in_names,
    placeholders,
)
from glmbatch.steps.extract import form_of
from glmbatch.steps.prompt import uses_chat


def check_step(step: Step, model: Model) -> None:
    """InputError when `model` cannot answer `step`."""
    where = f"step {step.name!r}: the checkpoint {describe_model(model.config)}"
    if model.is_tfidf and step.max_input_tokens is not None:
        raise InputError(
            f"{where} is TF-IDF, which reads texts of any length. Leave max_input_tokens out."
        )
    if model.has_head and step.examples is not None:
        raise InputError(f"{where} has a trained head, which reads no examples. Unset examples.")
    if step.history_column and not uses_chat(step, has_head=model.has_head, chats=model.chats):
        raise InputError(f"{where} is asked without the chat form. Unset history_column.")
    if isinstance(step, GenerateStep):
        _check_writer(where, model, step.max_tokens)
    elif isinstance(step, ExtractStep):
        _check_writer(where, model, form_of(step, tokenizer_of(model)).longest)
    elif isinstance(step, ClassifyStep):
        _check_classifier(where, step, model)


def _check_writer(where: str, model: Model, answer_tokens: int) -> None:
    if model.has_head:
        raise InputError(
            f"{where} has a classification head and cannot generate. Set the step's model."
        )
    if answer_tokens >= model.max_positions:
        raise InputError(
            f"{where} has {model.max_positions} positions, none left for a prompt. Set max_tokens."
        )


def _check_classifier(where: str, step: ClassifyStep, model: Model) -> None:
    if not model.has_head:
        if step.number:
            raise InputError(f"{where} has no trained head to predict a number. Set its model.")
        if step.labels is None:
            raise InputError(f"{where} has no trained head. Set the step's labels.")
        return
    _check_predicts(where, step, model)
    if step.compare != "sum":
        raise InputError(f"{where} has a head, whose labels have no length. Leave compare out.")
    if step.verdicts is not None:
        raise InputError(f"{where} has a head, which gives no verdicts. Leave verdicts out.")
    _check_trained_prompt(where, step, model)
    for setting, given in (("threshold", step.threshold), ("abstain_below", step.abstain_below)):
        unknown = sorted(given.keys() - set(model.labels)) if isinstance(given, dict) else []
        if unknown:
            raise InputError(
                f"step {step.name!r}: {setting} names {some_of(unknown)}, which "
                f"{'is no label' if len(unknown) == 1 else 'are no labels'}; the labels are "
                f"{some_of(model.labels)}."
            )
    if step.labels is not None and sorted(step.labels) != sorted(model.labels):
        advice = "Leave the step's labels out, or set them to those"
        if model.config.adapter:
            advice += f", or name them with id2label in {model.config.adapter}/config.json"
        raise InputError(
            f"{where} was trained for {some_of(model.labels)}, not {some_of(step.labels)}. "
            f"{advice}."
        )


def _check_predicts(where: str, step: ClassifyStep, model: Model) -> None:
    """InputError when the step wants another kind of answer than the head gives."""
    setting = "number" if step.number else "multiple" if step.multiple else None
    wanted: Predicts = "number" if step.number else "labels" if step.multiple else "label"
    if wanted == model.predicts:
        return
    if model.predicts == "label":
        raise InputError(
            f"{where} has a head that was trained to choose one label. Leave {setting} out, or set "
            "the step's model."
        )
    does, right = {
        "labels": ("judges each label by itself", "multiple"),
        "number": ("predicts a number", "number"),
    }[model.predicts]
    instead = f" instead of {setting}" if setting else ""
    raise InputError(f"{where} has a head that {does}. Set {right}: true{instead}.")


def trained_prompt(model: Model) -> dict[str, Any] | None:
    """The prompt that a head was trained with by `glmbatch train`; else None."""
    return recorded_prompt(model.config.path, model.config.adapter) if model.has_head else None


def as_trained(step: AnyStep, model: Model, columns: Collection[str]) -> AnyStep:
    """`step` with the prompt that its head was trained with, where the step sets none.

    It stays as it is if that prompt has other columns than those read for the step, `columns`.
    """
    trained = trained_prompt(model) if isinstance(step, ClassifyStep) else None
    return step if trained is None else with_trained(step, trained, columns)


def with_trained(
    step: AnyStep, trained: Mapping[str, Any], columns: Collection[str] | None = None
) -> AnyStep:
    """`step` with the prompt `trained`, where it sets none; with any columns, or only `columns`."""
    taken = {}
    names = placeholders(trained["prompt_template"])
    is_read = columns is None or all(name in columns for name in names)
    if is_read and step.prompt_template == ClassifyStep.model_fields["prompt_template"].default:
        taken["prompt_template"] = trained["prompt_template"]
        if step.system_prompt is None:
            taken["system_prompt"] = trained["system_prompt"]
    if step.chat is None and "chat" in trained:
        taken["chat"] = trained["chat"]
    return step.model_copy(update=taken)


def _check_trained_prompt(where: str, step: ClassifyStep, model: Model) -> None:
    """InputError when the step's prompt is not the one that the head was trained with."""
    trained = trained_prompt(model)
    if trained is None:
        return
    template = step.prompt_template
    if differ_in_names(template, trained["prompt_template"]):
        template = trained["prompt_template"]
    asked = {"prompt_template": template, "system_prompt": step.system_prompt, "chat": step.chat}
    for setting, value in asked.items():
        if setting in trained and value != trained[setting]:
            raise InputError(
                f"{where} was trained with the {setting} {trained[setting]!r}. "
                f"{_advice(step, setting, trained[setting])}"
            )


def _advice(step: ClassifyStep, setting: str, trained: object) -> str:
    """How to get the `trained` value of a setting, some of which a step takes if it sets none."""
    is_left_out = getattr(step, setting) == ClassifyStep.model_fields[setting].default
    # A system prompt is taken only with the template.
    if is_left_out or (setting == "system_prompt" and trained is not None):
        return f"Set the step's {setting} to that."
    return f"Leave the step's {setting} out, or set it to that."
