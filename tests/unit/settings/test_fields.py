"""Fields of an extract step: as declared, from a JSON schema or a class, or refused in one line."""

from __future__ import annotations

import datetime
import enum
import math
from typing import Any

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from glmbatch.errors import InputError
from glmbatch.settings.job import AnyStep, ExtractStep, JobConfig
from glmbatch.settings.jobfile import parse_settings
from tests.support import Settings

STEP: TypeAdapter[ExtractStep] = TypeAdapter(AnyStep)


def step(**settings: Any) -> ExtractStep:
    return STEP.validate_python({"kind": "extract", "name": "facts", **settings})


def test_fields_are_a_mapping_or_a_list() -> None:
    mapping = step(fields={"a": "text", "b": {"type": "list", "items": "date"}})
    listed = step(
        fields=[
            {"name": "a", "type": "text"},
            {"name": "b", "type": "list", "items": {"type": "date"}},
        ]
    )
    assert mapping == listed
    assert step(**mapping.model_dump(mode="json", exclude={"kind", "name"})) == mapping


def test_a_pattern_may_end_in_a_dollar_of_the_text() -> None:
    for pattern in (r"[0-9]{1,3}\$", r"^[0-9]{1,3}\$$"):
        field = step(fields={"price": {"type": "text", "pattern": pattern}}).fields[0]
        assert field.json_schema()["pattern"] == r"^(?:[0-9]{1,3}\$)$"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([{"name": "a", "type": "text"}, {"name": "A", "type": "text"}], "is declared twice"),
        ({"a": {"type": "integer", "minimum": 5, "maximum": 1}}, "minimum 5 and at most maximum 1"),
        ({"a": {"type": "integer", "minimum": 1.2, "maximum": 1.8}}, "no integer is at least"),
        (
            {"a": {"type": "number", "minimum": 0.11, "maximum": 0.12, "decimals": 1}},
            "no number of these decimals",
        ),
        ({"a": {"type": "integer", "maximum": 10**30}}, "bounds are at most"),
        ({"a": {"type": "number", "maximum": math.inf}}, "a finite number"),
        ({"a": {"type": "integer", "minimum": math.nan}}, "a finite number"),
        ({"a": {"type": "text", "pattern": "[a-z]+"}}, "without end"),
        ({"a": {"type": "text", "pattern": "a(?=b)"}}, "look-around"),
        ({"a": {"type": "text", "pattern": "[a"}}, "unclosed"),
        ({"a": {"type": "text", "pattern": "abc", "max_length": 2}}, "Unsatisfiable"),
        ({"a": {"type": "text", "pattern": "([a-z]{1,30} ){1,30}"}}, "without end"),
        ({"a": {"choices": ["good", "Good"]}}, "equal but for case"),
        ({"a": {"choices": ["\ud800", "x"]}}, "half of a surrogate pair"),
        ({"a": {"type": "text", "description": "\ud800"}}, "half of a surrogate pair"),
        ({"a": {"type": "integer", "minimum": True}}, "minimum is True; set a number"),
        ({"a": {"type": "number", "maximum": "five"}}, "maximum is 'five'; set a number"),
        ({"a": {"type": "text", "max_length": 10**30}}, "less than or equal to 1000000"),
        ({"a": {"type": "list", "items": "text", "max_items": 0}}, "greater than or equal to 1"),
        (
            {"a": {"type": "number", "minimum": 1e-9, "maximum": 2e-9, "nullable": True}},
            "no number of these decimals",
        ),
        ({"a": {"choices": ["good"]}}, "at least two"),
        ({"a": {"type": "list"}}, "a list needs items"),
        ({"a": {"type": "list", "items": "list"}}, "Input should be"),
        ({"a": {"type": "text", "minimum": 1}}, "minimum is for integer and number"),
        ({"a": {"choices": ["x", "y"], "minimum": 1}}, "integer and number, not for choice"),
        ({"a b": "text"}, "match pattern"),
        ({}, "at least 1 item"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        step(fields=fields)
    messages = [error["msg"] for error in refused.value.errors()]
    assert any(message in told for told in messages), messages
    assert all("\n" not in told for told in messages)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"bought": {"type": "date", "minimum": datetime.date(2020, 1, 1)}},
            "steps[0].fields.bought: minimum is for integer and number, not for date",
        ),
        ({"product name": "text"}, "fields.product name: must be letters, digits and underscores"),
        ([{"name": "a b", "type": "text"}], "fields[0].name: must be letters, digits and"),
        ({"a": "text", "b": "string"}, "steps[0].fields.b.type: must be 'text'"),
        ({"a": "string"}, "it is 'string'; did you mean text?"),
        ({"a": "str"}, "did you mean text?"),
        ({"a": "int"}, "did you mean integer?"),
        ({"a": "float"}, "did you mean number?"),
        ({"a": {"type": "list", "items": "bool"}}, "fields.a.items.type: must be 'text'"),
        ({"a": "bool"}, "did you mean boolean?"),
        ({"a": "datetime"}, "did you mean date?"),
        ({"a": None}, "steps[0].fields: field 'a' is empty; give it a type, such as a: text"),
        (["a", "b"], "steps[0].fields: each field of a list has a name and a type, such as"),
        ({}, "steps[0].fields: must not be empty; it is []"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(job_settings: Settings, fields: Any, line: str) -> None:
    settings = job_settings(steps=[{"kind": "extract", "name": "facts", "fields": fields}])
    with pytest.raises(InputError) as refused:
        parse_settings("job", settings, JobConfig)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_max_tokens_must_hold_the_fields() -> None:
    fields = {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": "boolean", "c": "text"}
    assert step(fields=fields, max_tokens=10).max_tokens == 10
    with pytest.raises(ValidationError, match="set max_tokens to 10 at least"):
        step(fields=fields, max_tokens=9)


def test_a_field_has_no_column_of_its_step(job_settings: Settings) -> None:
    settings = job_settings(
        steps=[{"kind": "extract", "name": "facts", "fields": {"error": "text"}}]
    )
    with pytest.raises(InputError, match="two columns would be named 'facts_error'"):
        parse_settings("job", settings, JobConfig, {})


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class WithoutSchema(BaseModel):
    kind: type


class Review(BaseModel):
    product: str = Field(max_length=20, description="what was bought")
    rating: int | None = Field(None, ge=1, le=5)
    mood: Mood
    bought: datetime.date | None
    tags: list[str] = Field(max_length=3)
    price: float = 0
    code: str = Field(pattern="^[A-Z]{2}$")


def test_a_pydantic_class_becomes_fields() -> None:
    declared = step(
        fields={
            "product": {"type": "text", "max_length": 20, "description": "what was bought"},
            "rating": {"type": "integer", "minimum": 1, "maximum": 5, "nullable": True},
            "mood": {"choices": ["good", "bad"]},
            "bought": {"type": "date", "nullable": True},
            "tags": {"type": "list", "items": "text", "max_items": 3},
            "price": {"type": "number", "nullable": True},
            "code": {"type": "text", "pattern": "[A-Z]{2}"},
        }
    )
    assert step(schema=Review) == declared
    assert step(schema=Review.model_json_schema()) == declared


@pytest.mark.parametrize(
    ("schema", "nullable"),
    [
        ({"enum": ["a", "b"]}, False),
        ({"enum": ["a", "b", None]}, True),
        ({"type": "string", "enum": ["a", "b"]}, False),
        ({"type": ["string", "null"], "enum": ["a", "b", None]}, True),
        # Null is of its types but not in its enum, or the reverse.
        ({"type": ["string", "null"], "enum": ["a", "b"]}, False),
        ({"type": "string", "enum": ["a", "b", None]}, False),
        ({"anyOf": [{"type": "string", "enum": ["a", "b"]}, {"type": "null"}]}, True),
        ({"anyOf": [{"enum": ["a", None, "b"]}]}, True),
    ],
)
def test_null_is_a_choice_where_the_enum_has_it(schema: Any, nullable: bool) -> None:
    (field,) = step(schema={**of(schema), "required": ["a"]}).fields
    assert (field.choices, field.nullable) == (["a", "b"], nullable)
    (field,) = step(schema=of(schema)).fields
    assert (field.choices, field.nullable) == (["a", "b"], True)


def of(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, **more}


LOOP = {"N": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}, "M": {"$ref": "#/$defs/M"}}


def test_a_definition_may_refer_to_another() -> None:
    definitions = {"B": {"$ref": "#/$defs/C"}, "C": {"type": "string", "maxLength": 3}}
    (field,) = step(schema=of({"$ref": "#/$defs/B"}, **{"$defs": definitions})).fields
    assert (field.type, field.max_length) == ("text", 3)


def test_the_longest_match_is_known_or_bounded() -> None:
    def longest(**settings: Any) -> int | None:
        fields = {"a": {"type": "text", **settings}}
        return step(fields=fields, max_tokens=700).fields[0].most_tokens

    assert longest(pattern="(a{1,5}b){1,3}c") == 19 + 2
    # Too much to decide, but no longer than `max_length`, with escapes for each character.
    assert longest(pattern="([a-z]{1,30} ){1,30}", max_length=100) == 6 * 100 + 2


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string"}, "not of an object"),
        ({"type": "object"}, "no properties"),
        (of({"type": "string", "minLength": 3}), "'minLength'"),
        (of({"type": "integer", "exclusiveMinimum": 3}), "'exclusiveMinimum'"),
        (of({"type": "string", "pattern": "a"}), "pattern without end"),
        (of({"type": "string", "format": "email"}), "'email'"),
        (of({"type": "object"}), "type 'object'"),
        (of({"type": ["string", "integer"]}), "has the types"),
        (of({"type": "array", "items": {"type": "array"}}), "type 'array'"),
        (of({"type": "array", "items": {"type": "string"}, "uniqueItems": True}), "'uniqueItems'"),
        (of({"enum": [1, 2]}), "other values than texts"),
        (of({"const": "x", "enum": ["x", "y"]}), "at least two choices"),
        (of({"enum": []}), "at least two choices"),
        (of({"type": "number", "multipleOf": 0.3}), "multipleOf 0.3"),
        (of({"type": "number", "multipleOf": True}), "multipleOf True"),
        (of({"$ref": "#/$defs/B"}), "not in its $defs"),
        (of({"$ref": ["a"]}), "not in its $defs"),
        (of({"$ref": "#/$defs/N"}, **{"$defs": LOOP}), "anyOf within anyOf"),
        (of({"$ref": "#/$defs/M"}, **{"$defs": LOOP}), "'M', which refers to itself"),
        (of({"$ref": "#/$defs/N"}, **{"$defs": []}), "$defs that are no mapping"),
        (of({"anyOf": "x"}), "has the anyOf 'x'; it is a list of schemas"),
        (of({"anyOf": 5}), "has the anyOf 5; it is a list of schemas"),
        (of({"type": "number", "multipleOf": 10**400}), "only 1, 0.1, 0.01 and so on are read"),
        (of({"oneOf": [{"type": "string"}]}), "'oneOf'"),
        (of({"not": {"type": "string"}}), "'not'"),
        (of({}), "has the type None"),
        (of({"type": {"x": 1}}), "has the type {'x': 1}"),
        (of({"type": "array", "items": {"type": ["string", "null"]}}), "['string', 'null']"),
        (of({"type": "array", "items": {"anyOf": [{"type": "string"}]}}), "'anyOf'"),
        (of({"type": "string", "pattern": 5}), "pattern 5, which is no text"),
        (of({"enum": "abc"}), "enum 'abc'; it is a list"),
        (of({"const": 5}), "other values than texts"),
        (of({"const": None}), "other values than texts"),
        (of({"enum": ["a", 1]}), "other values than texts"),
        (of({"type": "string"}, required="a"), "required: 'a'; it is a list"),
        (of({"type": "string"}, required=None), "required: None; it is a list"),
        (of({"type": "string"}, required=[["a"]]), "not in its properties"),
        (WithoutSchema, "the class has no JSON schema"),
        ({**of({"type": "string"}), "required": ["b"]}, "requires ['b']"),
        ({**of({"type": "string"}), "additionalProperties": True}, "additionalProperties"),
    ],
)
def test_a_schema_beyond_fields_is_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        step(schema=schema)
    assert message in refused.value.errors()[0]["msg"]


def test_fields_and_schema_together_are_refused() -> None:
    with pytest.raises(ValidationError, match="both set"):
        step(schema=Review, fields={"a": "text"})


@pytest.mark.parametrize(
    ("schema", "line"),
    [
        ("schema.json", "steps[0]: schema is 'schema.json', a text; write the JSON schema itself"),
        (
            {"type": "object", "properties": {"a": {"type": "string", "maxLength": "x"}}},
            "steps[0].schema.properties.a.max_length: must be a whole number; it is 'x'",
        ),
    ],
)
def test_a_fault_of_a_schema_is_named_there(job_settings: Settings, schema: Any, line: str) -> None:
    settings = job_settings(steps=[{"kind": "extract", "name": "facts", "schema": schema}])
    with pytest.raises(InputError) as refused:
        parse_settings("job", settings, JobConfig)
    assert line in str(refused.value) and "\n" not in str(refused.value)
