"""The settings as a page: every field of the settings classes with its kind, bounds, default and description."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

NAMES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "empty",
}
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}


def describe_settings(pages: Mapping[str, type[BaseModel]]) -> str:
    """Markdown: for each title the tables of its class and of all classes below it, each class once."""
    lines = [
        "# Settings",
        "",
        "Made from the settings classes by `glmbatch settings`. Names are dotted as `--set` takes them.",
        "",
    ]
    shown: set[str] = set()
    for title, kind in pages.items():
        schema = kind.model_json_schema()
        classes = {kind.__name__: schema, **schema["$defs"]}
        lines += [f"## {title}", ""]
        for name in _in_order(kind.__name__, classes):
            if name not in shown:
                shown.add(name)
                lines += _table(name, classes)
    return "\n".join(lines)


def _in_order(name: str, classes: Mapping[str, Any]) -> list[str]:
    """The class, then those that its fields hold, depth first."""
    found = [name]
    for field in classes[name].get("properties", {}).values():
        for inner in _references(field):
            found += [each for each in _in_order(inner, classes) if each not in found]
    return found


def _references(field: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2]
    for value in field.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield from _references(each)


def _table(name: str, classes: Mapping[str, Any]) -> list[str]:
    schema = classes[name]
    rows = []
    for field, stated in schema["properties"].items():
        default = "required" if field in schema.get("required", []) else _default(stated)
        said = stated.get("description") or classes[next(_references(stated))]["description"]
        rows.append(
            f"| `{field}` | {_kind(stated)} | {default} | {said.replace('|', chr(92) + '|')} |"
        )
    head = [
        f"### {name}",
        "",
        schema["description"],
        "",
        "| setting | kind | default | what it is |",
        "|---|---|---|---|",
    ]
    return [*head, *rows, ""]


def _kind(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    several: Sequence[Any] | None = field.get("anyOf") or field.get("oneOf")
    if several:
        return " or ".join(_kind(each) for each in several)
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}" if "items" in field else "list"
    bounds = [form.format(f"{field[key]:,}") for key, form in BOUNDS.items() if key in field]
    return " ".join([NAMES.get(field.get("type", ""), field.get("type", "any")), *bounds])


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field:
        return "its own defaults"
    value = field["default"]
    return "empty" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"
