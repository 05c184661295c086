"""The questions asked of each row. All settings but a step's name and audits change answers."""

from __future__ import annotations

import string
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, field_validator

from glmbatch.errors import some_of
from glmbatch.settings.columns import Columns
from glmbatch.settings.kinds import Settings, Share, StepName
from glmbatch.settings.model import ModelSetting

TEXT = "text"  # the placeholder of data.text_column, whatever that column is called


class Step(Settings):
    """What both kinds of step share."""

    name: StepName = Field(
        description="Name of the step and of its answer column; later prompts call it {name}."
    )
    prompt_template: str = Field(
        "{text}",
        min_length=1,
        description="Prompt of a row; {column} is replaced by the row's value, {{ }} are braces. "
        "Put what is the same for all rows first: its keys and values are computed once.",
    )
    system_prompt: str | None = Field(
        None, description="Instruction set before the first round of the chat form; empty: none."
    )
    chat: bool | None = Field(
        None,
        description="Put the prompt in the chat form that the model was trained on; empty: yes, "
        "but no for a trained head and for CodeGeeX2.",
    )
    max_input_tokens: int | None = Field(
        None, ge=1, description="Longest prompt in tokens; empty: what the model's positions leave."
    )
    on_too_long: Literal["error", "truncate"] = Field(
        "error",
        description="What becomes of a longer prompt. error: its row fails; truncate: the end of "
        "its text is cut off, which suits labels better than replies.",
    )
    model: ModelSetting | None = Field(
        None, description="Checkpoint of this step alone; empty: the job's model."
    )

    @field_validator("prompt_template")
    @classmethod
    def _placeholders(cls, template: str) -> str:
        placeholders(template)
        return template


class ClassifyAudits(Settings):
    """Limits on a classify step's labels; a run beyond one publishes nothing."""

    max_label_drift: float | None = Field(
        None,
        gt=0,
        description="How far the shares of labels may move from those published, as a population "
        "stability index: 0.1 is a small shift, 0.25 a large one. Start with 0.25. "
        "Empty: no audit.",
    )


class ClassifyStep(Step):
    """Choose one label for each row."""

    kind: Literal["classify"] = Field("classify", description="What kind of step this is.")
    labels: list[str] | None = Field(
        None,
        description="Labels to choose from; empty: the labels of the checkpoint's trained head.",
    )
    audits: ClassifyAudits = Field(
        default_factory=ClassifyAudits,
        description="Limits on the labels; a run beyond one publishes nothing.",
    )

    @field_validator("labels")
    @classmethod
    def _distinct_labels(cls, labels: list[str] | None) -> list[str] | None:
        if labels is None:
            return None
        if len(labels) < 2:
            raise ValueError(f"a choice needs at least two labels; it has {some_of(labels)}")
        if not all(label.strip() for label in labels):
            raise ValueError(f"a label is empty: {some_of(labels)}")
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"labels repeat: {some_of(repeated)}")
        return labels


class GenerateAudits(Settings):
    """Limits on a generate step's texts; a run beyond one publishes nothing."""

    max_truncated_rate: Share | None = Field(
        None,
        description="Share of answers that max_tokens may cut off. Start with 0.05. "
        "Empty: no audit.",
    )
    max_empty_rate: Share | None = Field(
        None, description="Share of answers that may be empty. Start with 0.01. Empty: no audit."
    )
    max_length_drift: float | None = Field(
        None,
        gt=0,
        description="How far the mean length of answers in tokens may move from that of those "
        "published, as a share of it: 0.5 allows half to one and a half. Empty: no audit.",
    )


class GenerateStep(Step):
    """Write a text for each row."""

    kind: Literal["generate"] = Field("generate", description="What kind of step this is.")
    max_tokens: int = Field(
        256,
        ge=1,
        le=32_768,
        # transformers' name for it, which users type by habit.
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
        description="Most tokens to write for a row. A longer answer is cut off and counted as "
        "truncated; room for it is only taken as it grows.",
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=10,
        description="0 takes the likeliest token, as facts and formats want; above 0 samples.",
    )
    top_p: float = Field(
        0.8, gt=0, le=1, description="Sample among the likeliest tokens of this total probability."
    )
    top_k: int = Field(
        50, ge=0, description="Sample among so many likeliest tokens; 0: no such limit."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of sampling; each row draws from (seed, row key)."
    )
    stop: list[str] = Field(
        default_factory=list, description="Texts that end an answer; they are not part of it."
    )
    audits: GenerateAudits = Field(
        default_factory=GenerateAudits,
        description="Limits on the texts; a run beyond one publishes nothing.",
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if not all(stop):
            raise ValueError("an empty stop text would end every answer at once")
        return stop


# `kind` chooses the class, so an error names a setting of that kind and not of both.
AnyStep = Annotated[ClassifyStep | GenerateStep, Field(discriminator="kind")]


def answer_columns(step: Step) -> list[str]:
    """Names of the output columns of `step`, in order."""
    columns = Columns(step.name)
    return columns.of_classify if isinstance(step, ClassifyStep) else columns.of_generate


def placeholders(template: str) -> list[str]:
    """Names that `template` takes from the row, in order, each once.

    ValueError when one is more than a plain column name, such as {a.b} or {a!r}.
    """
    names: list[str] = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        # {a.b} and {a[0]} would reach into a row's value, {0} and {} name no column.
        if spec or conversion or not name or name.isdigit() or any(mark in name for mark in ".[]"):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"placeholder {{{shown}}} must be a plain column name; write {{ and }} for braces"
            )
        if name not in names:
            names.append(name)
    return names
