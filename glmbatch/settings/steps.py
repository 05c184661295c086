"""The questions to ask about each row.

All settings but a step's name, condition and audits change answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator

from glmbatch.settings.columns import Columns
from glmbatch.settings.fields import Fields, check_room
from glmbatch.settings.json_schema import fields_of_schema
from glmbatch.settings.kinds import (
    Labels,
    Settings,
    Share,
    Threshold,
    Verdicts,
    check_multiple,
)
from glmbatch.settings.prompt import Step


class ClassifyAudits(Settings):
    """Limits on a classify step's labels; a run that exceeds one publishes nothing."""

    max_label_drift: float | None = Field(
        None,
        gt=0,
        description="Maximum shift of the label shares since the last publication, as a population "
        "stability index: 0.1 is a small shift, 0.25 a large one. Start with 0.25. "
        "Empty: no audit.",
    )


class ClassifyStep(Step):
    """Choose one label for each row, or judge each label by itself."""

    kind: Literal["classify"] = Field(
        "classify", description="Makes this a step that chooses a label for each row."
    )
    labels: Labels | None = Field(
        None,
        description="Labels to choose from. Empty: the labels of the checkpoint's trained head.",
    )
    abstain_below: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Least probability of the chosen label; below it, the row gets no label and "
        "the reason `abstained`, which is no failure. Empty: every row gets one.",
    )
    multiple: bool = Field(
        False,
        description="Whether a row may have several labels, or none: each label is judged by "
        "itself, and the answer is a list.",
    )
    compare: Literal["sum", "mean"] = Field(
        "sum",
        description="How labels of unlike length are compared. sum: by how likely the whole label "
        "is. mean: by the mean log-likelihood of its tokens, which does not put long labels at a "
        "disadvantage, but favors labels whose ends follow from their beginnings.",
    )
    threshold: Threshold = None
    verdicts: Verdicts = None
    audits: ClassifyAudits = Field(
        default_factory=ClassifyAudits,
        description="Limits on the labels; a run that exceeds one publishes nothing.",
    )

    @model_validator(mode="after")
    def _multiple_fits(self) -> Self:
        check_multiple(self.multiple, self.labels, self.threshold, self.verdicts)
        if self.multiple and self.abstain_below is not None:
            raise ValueError("abstain_below is for one label; with multiple: true set threshold")
        if self.compare == "mean" and (self.multiple or self.labels is None):
            raise ValueError("compare: mean is for a choice among labels; remove it")
        return self

    def threshold_of(self, label: str) -> float:
        """The probability from which on `label` is in the answer of a row."""
        given = self.threshold.get(label) if isinstance(self.threshold, dict) else self.threshold
        return 0.5 if given is None else given


TopP = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Sample from the likeliest tokens whose probabilities add up to this. "
        "1: no limit.",
    ),
]
TopK = Annotated[int, Field(ge=0, description="Sample from the K likeliest tokens. 0: no limit.")]
Seed = Annotated[
    int,
    Field(
        ge=0,
        lt=2**63,
        description="Seed for sampling; each row has its own random numbers, from the seed and its "
        "row key.",
    ),
]


class GenerateAudits(Settings):
    """Limits on written answers; a run that exceeds one publishes nothing."""

    max_truncated_rate: Share | None = Field(
        None,
        description="Maximum share of answers cut off at max_tokens. Start with 0.05. "
        "Empty: no audit.",
    )
    max_empty_rate: Share | None = Field(
        None, description="Maximum share of empty answers. Start with 0.01. Empty: no audit."
    )
    max_length_drift: float | None = Field(
        None,
        gt=0,
        description="Maximum relative change of the mean answer length in tokens since the last "
        "publication: 0.5 allows 50 to 150 percent of it. Empty: no audit.",
    )


class GenerateStep(Step):
    """Generate a text for each row."""

    kind: Literal["generate"] = Field(
        "generate", description="Makes this a step that generates a text for each row."
    )
    max_tokens: int = Field(
        256,
        ge=1,
        le=32_768,
        # The name in transformers, which users type by habit.
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
        description="Maximum tokens to generate for a row; a longer answer is cut off and counted "
        "as truncated. A high limit costs nothing until answers reach it: memory is allocated as "
        "they grow.",
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=10,
        description="0: always take the likeliest token, best for facts and fixed formats. "
        "Above 0: sample; higher values vary more.",
    )
    top_p: TopP = 0.8
    top_k: TopK = 50
    seed: Seed = 0
    stop: list[str] = Field(
        default_factory=list,
        description="Strings that end an answer; the answer does not include them.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Makes tokens less likely that the prompt or the answer already has, as in "
        "transformers. 1: off. Above 1.2 or so, answers drift from the subject.",
    )
    no_repeat_ngram_size: int = Field(
        0,
        ge=0,
        le=1024,
        description="No run of so many tokens occurs twice in a prompt and its answer, as in "
        "transformers. It ends loops, and forbids quoting longer runs of the prompt. 0: off.",
    )
    min_tokens: int = Field(
        0,
        ge=0,
        le=32_768,
        validation_alias=AliasChoices("min_tokens", "min_new_tokens"),
        description="The model cannot end an answer before so many tokens; a stop text can.",
    )
    log_probs: bool = Field(
        False,
        description="Whether to add the column {name}_log_prob: how likely the model, without "
        "temperature, penalties and limits, finds the answer; the natural logarithm, summed over "
        "its tokens.",
    )
    confidence: bool = Field(
        False,
        description="Whether to add the columns {name}_log_prob, {name}_mean_log_prob and "
        "{name}_least_log_prob: the sum over the tokens of an answer, their mean, and the least "
        "likely token, as for log_probs.",
    )
    abstain_below: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Least mean probability of a token, which is exp({name}_mean_log_prob); below "
        "it, the row gets no text and the reason `abstained`, which is no failure. Adds the "
        "columns of confidence. Empty: every row gets one.",
    )
    audits: GenerateAudits = Field(
        default_factory=GenerateAudits,
        description="Limits on the texts; a run that exceeds one publishes nothing.",
    )

    @property
    def tells_confidence(self) -> bool:
        """Whether the step has the columns of confidence."""
        return self.confidence or self.abstain_below is not None

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if not all(stop):
            raise ValueError("an empty stop string would end every answer at once; remove it")
        return stop

    @model_validator(mode="after")
    def _reachable_minimum(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; raise "
                "max_tokens or lower min_tokens"
            )
        return self


class ExtractStep(Step):
    """Fill in typed fields for each row."""

    kind: Literal["extract"] = Field(
        "extract", description="Makes this a step that fills in typed fields for each row."
    )
    fields: Fields = Field(
        min_length=1,
        description="The fields, in the order in which they are asked: a list, or a mapping from "
        "names to types or settings. Left out if `schema` is set.",
    )
    json_schema: dict[str, Any] | None = Field(
        None,
        alias="schema",
        exclude=True,  # it has become `fields`
        description="A JSON schema of an object, instead of `fields`; in Python also a pydantic "
        "class. Keywords that fields cannot express are refused.",
    )
    layout: Literal["columns", "struct"] = Field(
        "columns",
        description="columns: {name} has the answer as JSON text, and {name}_{field} each value. "
        "struct: {name} has all values.",
    )
    max_tokens: int = Field(
        256,
        ge=1,
        le=32_768,
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
        description="Maximum tokens of a row's values; the text between them is not counted. "
        "Values of bounded length have their longest reserved. Texts and lists share the rest: a "
        "longer one is cut off at a character or an item, and the answer counts as truncated.",
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=10,
        description="0: always take the likeliest token that a field allows. Above 0: sample; "
        "choices are never sampled.",
    )
    top_p: TopP = 0.8
    top_k: TopK = 50
    seed: Seed = 0
    audits: GenerateAudits = Field(
        default_factory=GenerateAudits,
        description="Limits on the answers; a run that exceeds one publishes nothing.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_schema(cls, values: object) -> object:
        if not isinstance(values, dict) or values.get("schema") is None:
            return values
        if values.get("fields"):
            raise ValueError("fields and schema are both set; remove one")
        others = {name: value for name, value in values.items() if name != "schema"}
        return {**others, "fields": fields_of_schema(values["schema"])}

    @model_validator(mode="after")
    def _distinct_columns(self) -> Self:
        columns = [column.casefold() for column in answer_columns(self)]
        for column in columns:
            if columns.count(column) > 1:
                raise ValueError(f"two columns would be named {column!r}; rename a field")
        return self

    @model_validator(mode="after")
    def _room_for_its_fields(self) -> Self:
        check_room(self.fields, self.max_tokens)
        return self


# `kind` chooses the class, so an error names only settings of that kind.
AnyStep = Annotated[ClassifyStep | GenerateStep | ExtractStep, Field(discriminator="kind")]


def answer_columns(step: AnyStep) -> list[str]:
    """Names of the columns that `step` adds to the output, in order."""
    columns = Columns(step.name)
    if isinstance(step, ClassifyStep):
        return columns.of_classify
    if isinstance(step, ExtractStep):
        fields = [field.name for field in step.fields] if step.layout == "columns" else []
        chosen = [field.name for field in step.fields if field.type == "choice"]
        return columns.of_extract(fields, chosen)
    return columns.of_generate(step.log_probs, step.tells_confidence)
