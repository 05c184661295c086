"""What all settings classes share: strictness, common types, and advice for keys that moved.

Reads no files and no environment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from glmbatch.settings.addresses import checked, on_this_machine

# Step names become column names, which every Parquet reader must accept.
NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
OutputFormat = Literal["parquet", "delta", "iceberg"]
Share = Annotated[float, Field(ge=0, le=1)]
StepName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]

# Keys of earlier versions or other tools, and what to use instead. A settings class without a field
# of that name refuses the key with this text.
MOVED = {
    "max_label_drift": "moved to audits.max_label_drift",
    "max_truncated_rate": "moved to audits.max_truncated_rate",
    "max_empty_rate": "moved to audits.max_empty_rate",
    "max_length_drift": "moved to audits.max_length_drift",
    "max_canary_change": "moved to canary.max_change",
    "price_per_hour": "moved to report.price_per_hour",
    "max_loaded_models": "was removed: the run measures how many models fit in memory",
    "retry_failed": "was removed: rows on which the model failed are always retried",
    "rope_scaling": "was removed: rope_ratio always means what it means in ChatGLM2",
    "n": "is for generate steps, which draw several texts and take the most frequent; remove it",
    "max_length": "would include the prompt; set max_tokens (and max_input_tokens) instead",
}
# Groups of settings that may be a string alone, and the setting that the string then is.
TEXT_ALONE = {"model": "path", "canary": "file", "evaluate": "rows"}

Address = Annotated[str, Field(min_length=1), AfterValidator(checked)]
LocalAddress = Annotated[str, Field(min_length=1), AfterValidator(on_this_machine)]


def _number_fields(schema: dict[str, Any]) -> None:
    # The Prefect form sorts the fields of a nested class by name unless each has a position.
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


def equal_but_for_case(names: Sequence[str]) -> list[str]:
    """Those of `names` that are there more than once in any case.

    They become columns or fields, whose case Spark and DuckDB ignore.
    """
    times = Counter(map(str.casefold, names))
    return [name for name in names if times[name.casefold()] > 1]


def text_alone(group: str) -> BeforeValidator:
    """Accept a string in place of a group that has only the setting of `TEXT_ALONE`."""
    name = TEXT_ALONE[group]
    return BeforeValidator(lambda value: {name: value} if isinstance(value, str) else value)


def value_for(name: str, given: float | Mapping[str, float] | None) -> float | None:
    """What a setting that is one number for all names, or one for each, says of `name`."""
    return given.get(name) if isinstance(given, Mapping) else given


class _Misplaced:
    """A value that pydantic would read as one of another type, but refuses in this guise."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def _misread(types: set[Any]) -> set[type]:
    """The types of values that pydantic would read as a boolean, number or date of `types`."""
    if bool in types:
        return {int, float}
    if date in types:  # as the seconds since 1970
        return {bool, int, float}
    return {bool} if types & {int, float} else set()


def _marked(value: Any, misplaced: set[type]) -> Any:
    """`value` with each part of the types `misplaced` marked."""
    if isinstance(value, Mapping):
        return {key: _marked(part, misplaced) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(part, misplaced) for part in value]
    return _Misplaced(value) if type(value) in misplaced else value


class Settings(BaseModel):
    """Base class of all settings: frozen, and strict about unknown keys.

    Forms show the fields in the order of declaration. Validation errors do not quote the refused
    value, because it may contain a secret.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra=_number_fields,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _say_where_it_moved(cls, values: object) -> object:
        if isinstance(values, dict):
            for key, place in MOVED.items():
                if key in values and key not in cls.model_fields:
                    raise ValueError(f"{key} {place}")
        return values

    @model_validator(mode="before")
    @classmethod
    def _mark_misplaced(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        marked = dict(values)
        for name, field in cls.model_fields.items():
            key = field.alias or name
            if key in values:
                types = set(_types_in(field.annotation))
                marked[key] = _marked(values[key], _misread(types))
        return marked
