"""What all settings classes share: strictness, common kinds of value, where moved keys went.

Reads no files and no environment.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from glmbatch.settings.addresses import checked, on_this_machine

# Names of steps become names of columns, which every reader of Parquet must be able to spell.
NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
Share = Annotated[float, Field(ge=0, le=1)]
StepName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]

# Keys of earlier versions, or of other tools, and what became of them. Such a key is refused with
# this line wherever a settings class has no field of that name.
MOVED = {
    "max_label_drift": "moved to audits.max_label_drift",
    "max_truncated_rate": "moved to audits.max_truncated_rate",
    "max_empty_rate": "moved to audits.max_empty_rate",
    "max_length_drift": "moved to audits.max_length_drift",
    "max_canary_change": "moved to canary.max_change",
    "price_per_hour": "moved to report.price_per_hour",
    "max_loaded_models": "was removed: the run measures how many models fit in memory",
    "retry_failed": "was removed: rows on which the model failed are always asked again",
    "rope_scaling": "was removed: rope_ratio is read as ChatGLM2 alone means it",
    "max_length": "would count the prompt too; set max_tokens (and max_input_tokens) instead",
}


Address = Annotated[str, Field(min_length=1), AfterValidator(checked)]
LocalAddress = Annotated[str, Field(min_length=1), AfterValidator(on_this_machine)]


def _number_fields(schema: dict[str, Any]) -> None:
    # The Prefect form sorts the fields of a nested class by name unless each carries its position.
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class Settings(BaseModel):
    """Frozen; refuses unknown keys, keeps declaration order in forms, quotes no refused value."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra=_number_fields, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _say_where_it_moved(cls, values: object) -> object:
        if isinstance(values, dict):
            for key, place in MOVED.items():
                if key in values and key not in cls.model_fields:
                    raise ValueError(f"{key} {place}")
        return values
