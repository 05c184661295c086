"""The fields of an extract step: their names, types and bounds, and what they are in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from glmbatch.errors import SHOWN_CHARS, shown, some_of
from glmbatch.settings.kinds import Settings, equal_but_for_case
from glmbatch.settings.steps.json_schema import LONGEST_MATCH, anchored, longest_match, satisfiable

# Letters of any script; a field's name becomes the name of a column.
FIELD_NAME = r"^[^\W\d]\w*$"
FieldName = Annotated[str, Field(pattern=FIELD_NAME, max_length=64)]
ValueType = Literal["text", "integer", "number", "boolean", "date", "choice"]

FieldType = Literal["text", "integer", "number", "boolean", "date", "choice", "list"]

# Numbers of 18 digits fit in 64 bits.
MOST_INTEGER = 10**18 - 1
# With `decimals` behind the point, about as many digits as a float64 keeps.
MOST_NUMBER = 10**12
DECIMALS = 6

# A calendar date of the years 0001 to 9999; February has 29 days in leap years alone.
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
_DAYS = (
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8])"
)
_DATE = f"^(?:{_YEAR}-(?:{_DAYS})|(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)$"

# Which settings a type has besides those of all types.
_OF_TYPES = {
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
    "decimals": ("number",),
    "pattern": ("text",),
    "max_length": ("text",),
    "choices": ("choice",),
    "items": ("list",),
    "max_items": ("list",),
}


def _typed(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


class FieldValue(Settings):
    """The type of a value and its bounds."""

    type: ValueType = Field(
        description="text; integer; number; boolean; date, such as 2024-02-29; or choice, which is "
        "one of `choices`."
    )
    choices: list[str] | None = Field(None, description="The values to choose from.")
    minimum: float | int | None = Field(None, description="The least number. Empty: no bound.")
    maximum: float | int | None = Field(None, description="The greatest number. Empty: no bound.")
    decimals: int | None = Field(
        None,
        ge=0,
        le=9,
        description=f"Maximum digits of a number behind its point. Empty: {DECIMALS}.",
    )
    pattern: str | None = Field(
        None,
        min_length=1,
        description="Regular expression that the whole text matches, without look-around. What it "
        f"matches has an end, at {LONGEST_MATCH} characters at most. Empty: any text.",
    )
    max_length: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Maximum characters of a text. Empty: as max_tokens allows.",
    )

    @model_validator(mode="before")
    @classmethod
    def _settings_of_its_type(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        if "choices" in values and "type" not in values:
            values = {"type": "choice", **values}
        # Before bounds are read as numbers, so that a date's minimum is refused for this reason.
        kind = values.get("type")
        for setting, types in _OF_TYPES.items():
            is_other = kind in get_args(FieldType) and kind not in types
            if is_other and values.get(setting) is not None:
                raise ValueError(f"{setting} is for {' and '.join(types)}, not for {kind}")
        for setting in ("minimum", "maximum"):
            bound = values.get(setting)
            if bound is not None and (
                isinstance(bound, bool) or not isinstance(bound, (int, float))
            ):
                raise ValueError(f"{setting} is {bound!r}; set a number, or leave it out")
        return values

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        self._check_choices()
        self._check_bounds()
        if self.pattern is not None:
            longest_match(self.pattern, self.max_length)
        return self

    def _check_choices(self) -> None:
        if self.type != "choice":
            return
        choices = self.choices or []
        if len(choices) < 2:
            raise ValueError(f"a choice needs at least two choices; it has {some_of(choices)}")
        for choice in choices:
            check_unicode("a choice", choice)
        if not all(choice.strip() for choice in choices):
            raise ValueError(f"a choice is empty: {some_of(choices)}")
        repeated = equal_but_for_case(choices)
        if repeated:
            raise ValueError(f"choices are equal but for case: {some_of(repeated)}")

    def _check_bounds(self) -> None:
        if self.type not in ("integer", "number"):
            return
        least, greatest = self.bounds
        if least > greatest:
            raise ValueError(
                f"no {self.type} is at least minimum {least} and at most maximum {greatest}"
            )
        most = MOST_INTEGER if self.type == "integer" else MOST_NUMBER
        if least < -most or greatest > most:
            raise ValueError(f"bounds are at most {most:,}; set minimum and maximum within")
        # Without null, which is always within.
        schema = FieldValue.json_schema(self)
        satisfiable(schema, f"no {self.type} of these decimals is within bounds")

    @property
    def bounds(self) -> tuple[float | int, float | int]:
        """The least and the greatest number."""
        most = MOST_INTEGER if self.type == "integer" else MOST_NUMBER
        least = -most if self.minimum is None else self.minimum
        greatest = most if self.maximum is None else self.maximum
        if self.type == "integer":
            return -int(-least // 1), int(greatest // 1)
        return least, greatest

    @property
    def _decimals(self) -> int:
        return DECIMALS if self.decimals is None else self.decimals

    def json_schema(self) -> dict[str, Any]:
        """The value in JSON Schema: what the form of an answer is held to."""
        if self.type == "choice":
            return {"type": "string", "enum": self.choices}
        if self.type == "boolean":
            return {"type": "boolean"}
        if self.type == "date":
            return {"type": "string", "pattern": _DATE}
        if self.type in ("integer", "number"):
            least, greatest = self.bounds
            schema: dict[str, Any] = {"type": self.type, "minimum": least, "maximum": greatest}
            if self.type == "number":
                schema["multipleOf"] = float(f"1e-{self._decimals}")
            return schema
        schema = {"type": "string"}
        if self.pattern is not None:
            schema["pattern"] = anchored(self.pattern)
        if self.max_length is not None:
            schema["maxLength"] = self.max_length
        return schema

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the value as JSON, with what ends it; None if it has no bound.

        Each token is at least one byte.
        """
        if self.type == "boolean":
            return len("false,")
        if self.type == "date":
            return len('2024-02-29",')
        if self.type == "choice":
            return max(len(json.dumps(c, ensure_ascii=False).encode()) for c in self.choices or [])
        if self.type in ("integer", "number"):
            digits = max(len(str(int(bound))) for bound in self.bounds)
            # -0.5 has a sign that its whole part lacks.
            sign = int(self.bounds[0] < 0)
            point = 1 + self._decimals if self.type == "number" and self._decimals else 0
            return sign + digits + point + 1
        if self.pattern is not None:
            return longest_match(self.pattern, self.max_length) + 2
        return None


class ExtractField(FieldValue):
    """One field of the answers of an extract step."""

    name: FieldName = Field(description="Name of the field. In a mapping, it is the field's key.")
    type: FieldType = Field(  # type: ignore[assignment]
        description="text; integer; number; boolean; date, such as 2024-02-29; choice, which is "
        "one of `choices`, with its probability in a column; or list, of `items`."
    )
    description: str | None = Field(None, description="What the field means, told to the model.")
    nullable: bool = Field(
        False, description="Whether the value may be null: the model says so where it knows none."
    )
    items: Annotated[FieldValue, BeforeValidator(_typed)] | None = Field(
        None, description="The values of a list; its type alone is enough."
    )
    max_items: int | None = Field(
        None, ge=1, le=1000, description="Maximum values of a list. Empty: as max_tokens allows."
    )

    @model_validator(mode="after")
    def _list_of_items(self) -> Self:
        check_unicode("the description", self.description or "")
        if self.type == "list" and self.items is None:
            raise ValueError("a list needs items, such as items: text")
        return self

    def json_schema(self) -> dict[str, Any]:
        """The value in JSON Schema."""
        schema = super().json_schema()
        if self.type == "list":
            assert self.items is not None
            schema = {"type": "array", "items": self.items.json_schema()}
            if self.max_items is not None:
                schema["maxItems"] = self.max_items
        return {"anyOf": [schema, {"type": "null"}]} if self.nullable else schema

    @property
    def most_tokens(self) -> int | None:
        """As of a value, or of null."""
        most = None if self.type == "list" else super().most_tokens
        return most if most is None or not self.nullable else max(most, len("null,"))

    @property
    def least_tokens(self) -> int:
        """The tokens without which the field cannot be written; choices are known beforehand."""
        return 0 if self.type == "choice" else self.most_tokens or 1

    def describe(self) -> str:
        """The field as a line of the prompt."""
        kind = _describe(self) if self.items is None else f"list of {_describe(self.items)}"
        if self.max_items is not None:
            kind += f", at most {self.max_items}"
        if self.nullable:
            kind += ", or null"
        line = f'- "{self.name}": {kind}'
        return f"{line}. {self.description}" if self.description else line


def _describe(value: FieldValue) -> str:
    if value.type == "choice":
        return f"one of {json.dumps(value.choices, ensure_ascii=False)[1:-1]}"
    names = {"boolean": "true or false", "date": "date as YYYY-MM-DD"}
    text = names.get(value.type, value.type)
    if value.minimum is not None:
        text += f", at least {value.minimum}"
    if value.maximum is not None:
        text += f", at most {value.maximum}"
    if value.max_length is not None:
        text += f", at most {value.max_length} characters"
    return text if value.pattern is None else f"{text}, as {value.pattern}"


def _seen(value: object) -> str:
    return "empty" if value is None else shown(repr(value))[:SHOWN_CHARS]


def as_fields(value: object) -> object:
    """`fields` as a list: a mapping has the names as keys, and a type alone stands for a field."""
    if isinstance(value, list):
        for field in value:
            if not isinstance(field, Mapping | ExtractField):
                raise ValueError(
                    "each field of a list has a name and a type, such as "
                    f"{{name: rating, type: integer}}; one is {_seen(field)}"
                )
    if not isinstance(value, Mapping):
        return value
    listed = []
    for name, typed in value.items():
        if not isinstance(typed, str | Mapping):
            raise ValueError(
                f"field {name!r} is {_seen(typed)}; give it a type, such as {name}: text, or "
                "settings, such as {type: text, max_length: 60}"
            )
        field = _typed(typed)
        listed.append({"name": name, **field} if isinstance(field, Mapping) else field)
    return listed


def check_unicode(what: str, text: str) -> None:
    """ValueError if `text` has half of a character, as JSON files can say, and Parquet cannot."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"{what} has half of a surrogate pair, {text!r}; write the whole character"
        )


def instructions(fields: Sequence[ExtractField]) -> str:
    """The text behind each prompt that tells the model its fields."""
    lines = "\n".join(field.describe() for field in fields)
    return f"Answer with a JSON object of these fields, in this order:\n{lines}"


def check_room(fields: Sequence[ExtractField], max_tokens: int) -> None:
    """ValueError if the values of `fields` may need more than `max_tokens`."""
    least = sum(field.least_tokens for field in fields)
    if max_tokens < least:
        raise ValueError(
            f"max_tokens {max_tokens} is too small for the fields, which take up to {least} "
            f"tokens; set max_tokens to {least} at least"
        )


def distinct(fields: list[ExtractField]) -> list[ExtractField]:
    """`fields`. ValueError if two have the same name."""
    alike = equal_but_for_case([field.name for field in fields])
    if alike:
        raise ValueError(f"field {alike[0]!r} is declared twice; remove or rename one")
    return fields


Fields = Annotated[list[ExtractField], BeforeValidator(as_fields), AfterValidator(distinct)]
