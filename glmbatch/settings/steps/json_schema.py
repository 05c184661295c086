"""JSON schemas: as the fields of an extract step, and whether any value is within one.

Of a schema or a pydantic class, only what fields can express is read. Any other keyword is refused
by name, because an answer would not be held to it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic.errors import PydanticInvalidForJsonSchema

from glmbatch.errors import SHOWN_CHARS, shown, some_of

# A longer match of a pattern is one without end.
LONGEST_MATCH = 256

# Keywords that say nothing about which values are valid.
_NOTES = {"title", "description", "default", "examples", "$comment", "$schema", "$id", "$defs"}
_TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "boolean"}
# Keywords that fields have under another name.
_SETTINGS = {"minimum": "minimum", "maximum": "maximum", "maxLength": "max_length"}
_KEYWORDS = {
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum", "multipleOf"),
    "string": ("maxLength", "pattern", "format"),
}


def fields_of_schema(schema: object) -> list[dict[str, Any]]:
    """The fields of `schema`, a mapping or a pydantic class. ValueError names what is refused."""
    as_json = getattr(schema, "model_json_schema", None)
    if callable(as_json):
        try:
            schema = as_json()
        except PydanticInvalidForJsonSchema as error:
            reason = error.message
            raise ValueError(
                f"the class has no JSON schema: {reason}; remove that field"
            ) from error
    if isinstance(schema, str):
        raise ValueError(
            f"schema is {shown(schema)[:SHOWN_CHARS]!r}, a text; write the JSON schema itself "
            "below schema, as a mapping"
        )
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        raise ValueError("the schema is not of an object; set its type to object")
    _refuse_others("the schema", schema, {"type", "properties", "required", "additionalProperties"})
    if schema.get("additionalProperties", False) is not False:
        raise ValueError("the schema allows additionalProperties; list all fields as properties")
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        raise ValueError("the schema has no properties; each is a field")
    required = schema.get("required", [])
    if not isinstance(required, list):
        raise ValueError(f"the schema has required: {required!r}; it is a list of properties")
    unlisted = [name for name in required if name not in list(properties)]
    if unlisted:
        raise ValueError(f"the schema requires {some_of(unlisted)}, which is not in its properties")
    definitions = schema.get("$defs", {})
    if not isinstance(definitions, Mapping):
        raise ValueError("the schema has $defs that are no mapping of names to schemas")
    fields = []
    for name, part in properties.items():
        # Each answer has all fields, so one that may be left out may be null instead.
        may_be_left_out = {} if name in required else {"nullable": True}
        fields.append({**_field(name, part, definitions), **may_be_left_out})
    return fields


def _field(name: str, schema: Any, definitions: Mapping[str, Any]) -> dict[str, Any]:
    where = f"property {name!r} of the schema"
    field: dict[str, Any] = {"name": name}
    if isinstance(schema, Mapping) and schema.get("description"):
        field["description"] = schema["description"]
    schema, nullable = _without_null(where, _resolved(where, schema, definitions), definitions)
    if nullable:
        field["nullable"] = True
    if schema.get("type") != "array":
        return {**field, **_value(where, schema)}
    _refuse_others(where, schema, {"type", "items", "maxItems"})
    items = _resolved(where, schema.get("items"), definitions)
    field |= {"type": "list", "items": _value(f"items of {where}", items)}
    if "maxItems" in schema:
        field["max_items"] = schema["maxItems"]
    return field


def _resolved(where: str, schema: Any, definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema`, or what its $ref refers to, with its own keywords."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} is not a schema of a value")
    resolved: Mapping[str, Any] = schema
    names: list[str] = []
    while "$ref" in resolved:
        name = str(resolved["$ref"]).removeprefix("#/$defs/")
        if not isinstance(definitions.get(name), Mapping):
            raise ValueError(f"{where} refers to {resolved['$ref']!r}, which is not in its $defs")
        if name in names:
            raise ValueError(f"{where} refers to {name!r}, which refers to itself")
        names.append(name)
        own = {key: value for key, value in resolved.items() if key != "$ref"}
        resolved = {**definitions[name], **own}
    return resolved


def _without_null(
    where: str, schema: Mapping[str, Any], definitions: Mapping[str, Any]
) -> tuple[Mapping[str, Any], bool]:
    """The schema of the value, and whether it may be null."""
    if isinstance(schema.get("enum"), list):
        rest, nullable = _without_null(
            where, {key: value for key, value in schema.items() if key != "enum"}, definitions
        )
        # Without a type, the enum alone says which values are valid.
        nullable = None in schema["enum"] and (nullable or "type" not in rest)
        return {**rest, "enum": [value for value in schema["enum"] if value is not None]}, nullable
    if "anyOf" in schema:
        if not isinstance(schema["anyOf"], list):
            raise ValueError(f"{where} has the anyOf {schema['anyOf']!r}; it is a list of schemas")
        parts = [_resolved(where, part, definitions) for part in schema["anyOf"]]
        others = [part for part in parts if part.get("type") != "null"]
        if len(others) != 1:
            raise ValueError(f"{where} has anyOf of {len(others)} types; a field has one, or null")
        if "anyOf" in others[0]:
            raise ValueError(f"{where} has an anyOf within anyOf; list its types in one")
        around = {key: value for key, value in schema.items() if key != "anyOf"}
        part, nullable = _without_null(where, others[0], definitions)
        return {**around, **part}, nullable or len(others) < len(parts)
    types = schema.get("type")
    if isinstance(types, list):
        others = [name for name in types if name != "null"]
        if len(others) != 1:
            raise ValueError(f"{where} has the types {some_of(types)}; a field has one, or null")
        return {**schema, "type": others[0]}, len(others) < len(types)
    return schema, False


def _value(where: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    if "enum" in schema or "const" in schema:
        _refuse_others(where, schema, {"type", "enum", "const"})
        choices = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(choices, list):
            raise ValueError(f"{where} has the enum {choices!r}; it is a list of texts")
        if not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"{where} has an enum of other values than texts")
        return {"type": "choice", "choices": list(choices)}
    kind = schema.get("type")
    if kind is None:
        _refuse_others(where, schema, set().union(*_KEYWORDS.values()))
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(
            f"{where} has the type {kind!r}; a field has one of {some_of(list(_TYPES))}"
        )
    _refuse_others(where, schema, {"type", *_KEYWORDS.get(kind, ())})
    value: dict[str, Any] = {"type": _TYPES[kind]}
    for keyword, setting in _SETTINGS.items():
        if keyword in schema:
            value[setting] = schema[keyword]
    if "multipleOf" in schema:
        value["decimals"] = _decimals(where, schema["multipleOf"])
    if "pattern" in schema:
        value["pattern"] = _whole(where, schema["pattern"])
    if "format" not in schema:
        return value
    if schema["format"] != "date" or len(value) > 1:
        raise ValueError(f"{where} has the format {schema['format']!r}; only date alone is read")
    return {"type": "date"}


def _decimals(where: str, step: Any) -> int:
    is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
    for decimals in range(10):
        if is_number and step <= 1 and math.isclose(step, 10.0**-decimals):
            return decimals
    raise ValueError(f"{where} has multipleOf {step!r}; only 1, 0.1, 0.01 and so on are read")


def _whole(where: str, pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise ValueError(f"{where} has the pattern {pattern!r}, which is no text")
    # In a JSON schema, a pattern may match anywhere in a text, around which there may be any other.
    if not (pattern.startswith("^") and pattern.endswith("$")):
        raise ValueError(
            f"{where} has a pattern without end, {pattern!r}; begin it with ^ and end it with $"
        )
    return pattern[1:-1]


def _refuse_others(where: str, schema: Mapping[str, Any], read: set[str]) -> None:
    others = sorted(schema.keys() - read - _NOTES)
    if others:
        raise ValueError(
            f"{where} has {some_of(others)}, which fields cannot be held to; remove it"
        )


def anchored(pattern: str) -> str:
    """`pattern` as one that matches whole texts only."""
    # A dollar behind a backslash is one of the text.
    inner = re.sub(r"(?<!\\)((?:\\\\)*)\$\Z", r"\1", pattern.removeprefix("^"))
    return f"^(?:{inner})$"


def satisfiable(schema: Mapping[str, Any], message: str) -> None:
    """ValueError if no value is within `schema`, or its pattern cannot be used."""
    fault = _fault(json.dumps(schema))
    if fault is not None:
        raise ValueError(f"{message}: {fault}")


def allows(schema: Mapping[str, Any], value: object) -> bool:
    """Whether an answer that is held to `schema` may be `value`."""
    from llguidance import LLMatcher, LLTokenizer

    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    written = [*json.dumps(value, ensure_ascii=False).encode(errors="replace")]
    return matcher.try_consume_tokens(written) == len(written) and matcher.is_accepting()


@lru_cache(4096)
def _fault(schema: str) -> str | None:
    from llguidance import LLMatcher

    fault: str = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    if not fault:
        return None
    lines = [
        line.strip() for line in fault.replace("failed to compile JSON schema: ", "").split("\n")
    ]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[0] if told else lines[0]


@lru_cache(1024)
def longest_match(pattern: str, max_length: int | None) -> int:
    """The most bytes of a text, as JSON has it, that matches `pattern`.

    ValueError if there is no such text, or one that is too long.
    """
    schema: dict[str, Any] = {"type": "string", "pattern": anchored(pattern)}
    if max_length is not None:
        schema["maxLength"] = max_length
    satisfiable(schema, f"pattern {pattern!r} cannot be used")
    if not _excluded({**schema, "minLength": LONGEST_MATCH + 1}):
        raise ValueError(
            f"pattern {shown(pattern)[:SHOWN_CHARS]!r} matches texts without end; bound its "
            "repeats, such as {1,20} for +, or set max_length"
        )
    shortest, longest = 0, LONGEST_MATCH
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if _excluded({**schema, "minLength": middle}):
            longest = middle - 1
        else:
            shortest = middle
    # Beyond plain ASCII a character is up to four bytes, and an escape up to six.
    others = {**schema, "allOf": [{"pattern": r"[^ !#-\[\]-~]"}]}
    return longest * (1 if _excluded(others) else 6)


def _excluded(schema: Mapping[str, Any]) -> bool:
    """Whether surely no value is within `schema`.

    Repeats of repeats are too much to decide for llguidance, and it says so in another fault.
    """
    return (_fault(json.dumps(schema)) or "").startswith("Unsatisfiable")
