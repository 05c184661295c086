"""Extract steps, whose answers are typed fields."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from glmbatch.settings.columns import Columns
from glmbatch.settings.kinds import equal_but_for_case
from glmbatch.settings.steps.fields import Fields, check_room
from glmbatch.settings.steps.generate import (
    AbstainBelow,
    GenerateAudits,
    MaxTokens,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from glmbatch.settings.steps.json_schema import fields_of_schema
from glmbatch.settings.steps.step import Step


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
    max_tokens: MaxTokens = Field(
        256,
        description="Maximum tokens of a row's values; the text between them is not counted. "
        "Values of bounded length have their longest reserved. Texts and lists share the rest: a "
        "longer one is cut off at a character or an item, and the answer counts as truncated.",
    )
    temperature: Temperature = Field(
        0.0,
        description="0: always take the likeliest token that a field allows. Above 0: sample; "
        "choices are never sampled.",
    )
    top_p: TopP = 0.8
    top_k: TopK = 50
    seed: Seed = 0
    confidence: bool = Field(
        False,
        description="Whether to add three columns for each field that is no choice: "
        "{name}_{field}_log_prob, {name}_{field}_mean_log_prob and {name}_{field}_least_log_prob. "
        "They say how likely the model finds the value among those that the field allows: the sum "
        "over its tokens, their mean, and the least likely token, as natural logarithms.",
    )
    abstain_below: AbstainBelow | None = Field(
        None,
        description="Least confidence in a value: of a choice its probability, of other fields the "
        "mean probability of a token, which is exp({name}_{field}_mean_log_prob). Below it, the "
        "field is null and {name}_abstained lists it; if all fields are, the row has no answer and "
        "the reason `abstained`, which is no failure. Adds the columns of confidence. Empty: every "
        "field has its value.",
    )
    audits: GenerateAudits = Field(
        default_factory=GenerateAudits,
        description="Limits on the answers; a run that exceeds one publishes nothing.",
    )

    @property
    def tells_confidence(self) -> bool:
        """Whether the step has the columns of confidence."""
        return self.confidence or self.abstain_below is not None

    @property
    def chosen(self) -> list[str]:
        """Names of the fields that are a choice."""
        return [field.name for field in self.fields if field.type == "choice"]

    @property
    def written(self) -> list[str]:
        """Names of the other fields, whose values the model writes."""
        return [field.name for field in self.fields if field.type != "choice"]

    @property
    def answer_columns(self) -> list[str]:
        """Names of the columns that the step adds to the output, in order."""
        fields = [field.name for field in self.fields] if self.layout == "columns" else []
        sure = self.written if self.tells_confidence else []
        abstains = self.abstain_below is not None
        return Columns(self.name).of_extract(fields, self.chosen, sure, abstains=abstains)

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
        alike = equal_but_for_case(self.answer_columns)
        if alike:
            raise ValueError(f"two columns would be named {alike[0].casefold()!r}; rename a field")
        return self

    @model_validator(mode="after")
    def _room_for_its_fields(self) -> Self:
        check_room(self.fields, self.max_tokens)
        return self
