"""Extract steps, whose answers are typed fields."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from glmbatch.settings.columns import Columns
from glmbatch.settings.steps.fields import Fields, check_room
from glmbatch.settings.steps.generate import GenerateAudits, Seed, TopK, TopP
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

    @property
    def answer_columns(self) -> list[str]:
        """Names of the columns that the step adds to the output, in order."""
        fields = [field.name for field in self.fields] if self.layout == "columns" else []
        chosen = [field.name for field in self.fields if field.type == "choice"]
        return Columns(self.name).of_extract(fields, chosen)

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
        columns = [column.casefold() for column in self.answer_columns]
        for column in columns:
            if columns.count(column) > 1:
                raise ValueError(f"two columns would be named {column!r}; rename a field")
        return self

    @model_validator(mode="after")
    def _room_for_its_fields(self) -> Self:
        check_room(self.fields, self.max_tokens)
        return self
