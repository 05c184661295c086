"""Ten extract steps, and a check of an answer against them that shares no code with ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from glmbatch.settings.job import ExtractStep

SCHEMAS: list[dict[str, Any]] = [
    {"text": "text"},
    {"rating": {"type": "integer", "minimum": 1, "maximum": 5}, "why": "text"},
    {"tags": {"type": "list", "items": "text", "max_items": 3}, "done": "boolean"},
    {"day": "date", "note": {"type": "text", "max_length": 5, "nullable": True}},
    {"price": {"type": "number", "minimum": -2.5, "maximum": 99.99, "decimals": 2}},
    {"code": {"type": "text", "pattern": "[A-Z]{2}-[0-9]{1,3}"}, "text": "text"},
    {"mood": {"choices": ['say "good"', "bad\\", "好"], "nullable": True}, "text": "text"},
    {"days": {"type": "list", "items": "date", "nullable": True}, "left": "integer"},
    {
        "a": {"type": "integer", "minimum": -12, "maximum": 1500, "nullable": True},
        "kinds": {"type": "list", "items": {"choices": ["x", "xy", "好"]}},
        "b": {"choices": ["yes", "no"]},
        "numbers": {"type": "list", "items": {"type": "number", "decimals": 1}, "max_items": 4},
    },
    {"产品": "text", "愿望": {"type": "text", "nullable": True}, "flag": {"type": "boolean"}},
]


def step_of(fields: Any, name: str = "facts", **settings: Any) -> ExtractStep:
    """An extract step of these fields, with plain prompts."""
    return ExtractStep(name=name, chat=False, fields=fields, **settings)


def steps(**settings: Any) -> list[ExtractStep]:
    """An extract step of each schema."""
    return [step_of(fields, f"step{at}", **settings) for at, fields in enumerate(SCHEMAS)]


def faults(fields: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """The fields whose values are outside their schema."""
    assert list(values) == list(fields)
    return [name for name in fields if not _fits(_settings(fields[name]), values[name])]


def _settings(field: Any) -> Mapping[str, Any]:
    if isinstance(field, str):
        return {"type": field}
    return {"type": "choice", **field} if "choices" in field else dict(field)


def _fits(field: Mapping[str, Any], value: Any) -> bool:
    if value is None:
        return bool(field.get("nullable"))
    if field["type"] == "list":
        items = _settings(field["items"])
        few = len(value) <= field.get("max_items", 10**6)
        return few and all(_fits(items, item) for item in value)
    kinds = {"integer": int, "number": float, "boolean": bool, "date": date}
    if type(value) is not kinds.get(field["type"], str):
        return False
    if field["type"] in ("integer", "number"):
        return bool(field.get("minimum", value) <= value <= field.get("maximum", value))
    if field["type"] == "text":
        short = len(value) <= field.get("max_length", 10**6)
        return short and re.fullmatch(field.get("pattern", "(?s:.*)"), value) is not None
    return field["type"] != "choice" or value in field["choices"]
