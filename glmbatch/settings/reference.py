"""The settings as a Markdown page: each field with its type, bounds, default and description.

The page is generated from the JSON schemas of the settings classes, as the Prefect form is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

# Names of JSON types on the page.
NAMES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "empty",
}
# Keywords of JSON Schema for bounds, and how the page shows them.
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}
# An unescaped bar in a cell would end it.
BAR = r"\|"


def describe_settings(pages: Mapping[str, type[BaseModel]]) -> str:
    """The page as Markdown: under each title, a table for its class and each class it uses.

    A class that several titles use appears once, under the first.
    """
    lines = [
        "# Settings",
        "",
        "This page lists every setting of a [job](jobs.md) and of a [training](training.md). "
        "`glmbatch settings` prints it.",
        "",
        "Each table is one group of settings. The keys at the top of a job file are those of "
        "JobConfig; a link in the type column leads to the keys inside a group. `empty` means "
        "that the setting is left out or `null`.",
        "",
        "`--set` overrides any of them for one run by its dotted name, such as "
        "`--set data.limit=100` or `--set steps.0.max_input_tokens=512`; steps count from 0.",
        "",
    ]
    shown: set[str] = set()
    for title, kind in pages.items():
        schema = kind.model_json_schema()
        classes = {kind.__name__: schema, **schema["$defs"]}
        lines += [f"## {title}", ""]
        # A job and a training share classes, such as RuntimeConfig.
        for name in _in_order(kind.__name__, classes):
            if name not in shown:
                shown.add(name)
                lines += _table(name, classes)
    return "\n".join(lines)


def _in_order(name: str, classes: Mapping[str, Any]) -> list[str]:
    """The class, then the classes of its fields, depth first."""
    names = [name]
    for field in classes[name].get("properties", {}).values():
        for inner in _references(field):
            for other in _in_order(inner, classes):
                if other not in names:
                    names.append(other)
    return names


def _references(field: Mapping[str, Any]) -> Iterator[str]:
    """Names of the classes that the schema of a field refers to, at any depth."""
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2]
    for value in field.values():
        # `anyOf` is a list of schemas, `items` a single one.
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping):
                yield from _references(part)


def _table(name: str, classes: Mapping[str, Any]) -> list[str]:
    """The heading, description and table of one class."""
    schema = classes[name]
    lines = [
        f"### {name}",
        "",
        schema["description"],
        "",
        "| setting | type | default | description |",
        "|---|---|---|---|",
    ]
    required = schema.get("required", [])
    for field_name, field in schema["properties"].items():
        default = "required" if field_name in required else _default(field)
        # A group without a description of its own takes the one of its class.
        description = field.get("description") or classes[next(_references(field))]["description"]
        text = description.replace("|", BAR)
        lines.append(f"| `{field_name}` | {_kind(field)} | {default} | {text} |")
    return [*lines, ""]


def _kind(field: Mapping[str, Any]) -> str:
    """The values that a field accepts, with links to classes."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    alternatives = field.get("anyOf") or field.get("oneOf")
    if alternatives:
        return " or ".join(map(_kind, alternatives))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}" if "items" in field else "list"
    words = [NAMES.get(field.get("type", ""), field.get("type", "any"))]
    for key, form in BOUNDS.items():
        if key in field:
            words.append(form.format(f"{field[key]:,}"))
    return " ".join(words)


def _default(field: Mapping[str, Any]) -> str:
    # The schema of a group does not repeat the defaults inside it.
    if "default" not in field:
        return "`[]`" if field.get("type") == "array" else "those of the group"
    value = field["default"]
    return "empty" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"
