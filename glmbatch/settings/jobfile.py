"""Loads a file of settings and the overrides of the command line into a settings class.

All errors are reported together in one InputError, one line each with the file and the setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import date
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError, counted
from glmbatch.settings.addresses import has_credentials
from glmbatch.settings.job import DEVICE, AnyStep, JobConfig
from glmbatch.settings.kinds import NAME_PATTERN, TEXT_ALONE
from glmbatch.settings.reading import parse_yaml, read_settings
from glmbatch.settings.steps.fields import FIELD_NAME

# Types that YAML reads unquoted words as: yes, off, 1.0, 012, 2024-01-01, ~.
NOT_QUOTED = (bool, int, float, date, type(None))
MOST_SHOWN = 100
# What a quoted text begins with in YAML, and what stands for no text.
QUOTES = ('"', "'", "|", ">")
NOTHING = ("", "~", "null")

# The class of each kind of step.
KINDS: dict[str, type[BaseModel]] = {
    step.model_fields["kind"].default: step for step in get_args(get_args(AnyStep)[0])
}
# What other tools call the types of a field.
OTHER_TYPES = {
    "string": "text",
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "datetime": "date",
}
NAMES = "{}, digits and underscores, and begin with no digit"
PATTERNS = {
    NAME_PATTERN: NAMES.format("letters from a to z"),
    FIELD_NAME: NAMES.format("letters"),
    DEVICE: "auto, cpu, cuda or one such as cuda:1",
}
MUST = {
    "invalid_key": "must be text, as all names of settings",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "too_long": "must have {max_length} values at most",
}
CONSTRAINED = "constrained-"
TYPE_NAMES = ("bool", "dict", "float", "int", "list", "str")
# What a value must be, by the type of pydantic's error, with what its context tells of the bounds.
MUST_BE = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "date": "a date, such as 2026-11-25",
    "list": "a list, such as [a, b]",
    "dict": "a mapping, such as {{name: value}}",
    "model": "a group of settings, such as {{name: value}}",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}

AnySettings = TypeVar("AnySettings", bound=BaseModel)


def load_job(path: str, overrides: Mapping[str, object] | None = None) -> JobConfig:
    """The job in a YAML or JSON file; `overrides` and errors as in `parse_settings`."""
    return load_settings(path, JobConfig, overrides)


def load_settings(
    path: str, kind: type[AnySettings], overrides: Mapping[str, object] | None = None
) -> AnySettings:
    """The settings in a YAML or JSON file; `overrides` and errors as in `parse_settings`."""
    what = "job file" if issubclass(kind, JobConfig) else "file with a training's settings"
    return parse_settings(path, read_settings(Path(path), what), kind, overrides)


def parse_settings(
    where: str,
    settings: Mapping[str, Any],
    kind: type[AnySettings],
    overrides: Mapping[str, object] | None = None,
) -> AnySettings:
    """The validated settings, after `overrides` (dotted name to value) replace those in `settings`.

    InputError with one line per error; each line begins with `where`.
    """
    # Overrides are applied in place, and the caller may use its settings again.
    changed = deepcopy(dict(settings))
    for name, value in (overrides or {}).items():
        _set(changed, name, value)
    try:
        return kind.model_validate(changed)
    except ValidationError as error:
        reasons: dict[str, str] = {}
        for detail in error.errors():
            name, reason = _setting(detail, changed), _reason(detail, kind)
            reasons[name] = _either(reasons[name], reason) if name in reasons else reason
        # Of a setting that may be of two types, what is wrong within it says more.
        for name in [*reasons]:
            if any(other.startswith((f"{name}.", f"{name}[")) for other in reasons):
                del reasons[name]
        lines = [f"{where}: {name}: {reason}" for name, reason in reasons.items()]
        raise InputError("\n".join(lines)) from error


def read_value(kind: type[BaseModel], name: str, text: str) -> object:
    """The value that `text` of a command line gives the setting with the dotted `name`.

    It is YAML. A setting that holds a text takes `text` as it is typed, unless it is quoted, so
    that YAML reads no mapping, boolean, number or comment from it. Errors are as of `parse_yaml`.
    """
    types: list[Any] = [kind]
    for part in name.split("."):
        types = list(chain.from_iterable(_parts(outer, part) for outer in types))
    if not types or not all(map(_is_text, types)):
        return parse_yaml(text)
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError):
        return text.strip()
    may_be_empty = any(type(None) in _members(each) for each in types)
    typed = text.strip()
    if typed.lower() in NOTHING and may_be_empty:
        return None
    return value if isinstance(value, str) and typed.startswith(QUOTES) else typed


def _parts(kind: Any, part: str) -> Iterator[Any]:
    """The types that `part` of a setting of type `kind` may have: a field, an item or a value."""
    for member in _members(kind):
        if isinstance(member, type) and issubclass(member, BaseModel):
            if part in member.model_fields:
                yield member.model_fields[part].annotation
        elif get_args(member) and get_origin(member) is not Literal:
            yield get_args(member)[-1]


def _members(kind: Any) -> list[Any]:
    """The types of a union, without what annotates them; else the type alone."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) not in (Union, UnionType):
        return [kind]
    return list(chain.from_iterable(map(_members, get_args(kind))))


def _is_text(kind: Any) -> bool:
    """Whether a setting of type `kind` holds a text, or a word of a few, or nothing."""
    for member in _members(kind):
        if get_origin(member) is Literal:
            if not all(isinstance(word, str) for word in get_args(member)):
                return False
        elif member not in (str, type(None)):
            return False
    return True


def _set(settings: dict[str, Any], name: str, value: object) -> None:
    """Set the dotted `name`; a number in it is a list index."""
    *parents, last = name.split(".")
    group: Any = settings
    for depth, part in enumerate(parents):
        if isinstance(group, list):
            group = group[_place(group, part, name)]
            continue
        if not isinstance(group, dict):
            raise InputError(f"{name}: {'.'.join(parents[:depth])} is not a group of settings.")
        if part in TEXT_ALONE and isinstance(group.get(part), str):
            group[part] = {TEXT_ALONE[part]: group[part]}
        # Create a missing group, so that `--device` works without `runtime` in the job file.
        group = group.setdefault(part, {})
    if isinstance(group, list):
        group[_place(group, last, name)] = value
    elif not isinstance(group, dict):
        raise InputError(f"{name}: {'.'.join(parents)} is not a group of settings.")
    else:
        group[last] = value


def _place(items: list[Any], part: str, name: str) -> int:
    """`part` of the dotted `name` as an index of `items`."""
    if not part.isdigit() or int(part) >= len(items):
        raise InputError(
            f"{name}: {part!r} is not an index of a list of {len(items)}; they start at 0."
        )
    return int(part)


def _setting(detail: Any, settings: object) -> str:
    """The setting with the error, as a person would write it in `settings`: steps[0].labels."""
    name = ""
    group: Any = settings
    is_key = False
    for part in detail["loc"]:
        # After a step's index, pydantic adds its kind, which is not part of the name.
        if (name.endswith("]") and part in KINDS) or (is_key and part == "name"):
            continue
        # Of a setting that may be of two types, it adds the type; of a wrong name, this mark.
        if part == "[key]" or (isinstance(part, str) and _is_type(part) and not _has(group, part)):
            continue
        # A mapping of fields was read as a list, and its keys as the names of the fields.
        if part == "fields" and isinstance(group, Mapping) and group.get("schema") is not None:
            name, group = f"{name}.schema.properties", _properties(group["schema"])
            continue
        listed = name.endswith((".fields", ".properties"))
        is_key = isinstance(part, int) and listed and isinstance(group, Mapping)
        key = list(group)[part] if is_key else part
        if isinstance(part, int) and not is_key and not isinstance(group, Mapping):
            name += f"[{part}]"
        else:
            name += f".{key}" if name else str(key)
        if isinstance(group, list) and isinstance(part, int):
            group = group[part]
        else:
            group = group.get(key) if isinstance(group, Mapping) else None
    if detail["type"].startswith("union_tag_"):
        name += ".kind"
    return name or "job"


def _is_type(part: str) -> bool:
    return part.partition("[")[0].removeprefix(CONSTRAINED) in TYPE_NAMES


def _has(group: object, name: str) -> bool:
    return isinstance(group, Mapping) and name in group


def _bound(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _either(one: str, other: str) -> str:
    """One sentence of what is wrong with a setting that may be of two types."""
    ends = [reason.rpartition("; it is ") for reason in (one, other)]
    first, second = (end[0].removeprefix("must be ") for end in ends)
    if ends[0][2] != ends[1][2] or first == second or not first or not second:
        return one
    return f"must be {first}, or {second}; it is {ends[0][2]}"


def _properties(schema: Any) -> Any:
    """The properties of a JSON schema or pydantic class, by name."""
    return getattr(schema, "model_fields", None) or dict(schema).get("properties")


def _reason(detail: Any, settings: type[BaseModel]) -> str:
    """What is wrong, as the rest of a sentence that began with the setting."""
    if detail["type"] == "missing":
        return "is required but not set"
    if detail["type"] == "extra_forbidden":
        return f"is not a setting{_hint(detail['loc'], settings)}"
    if detail["type"].startswith("union_tag_"):
        return _wrong_kind(detail["ctx"].get("tag"))
    message = str(detail["msg"])
    # Our own validators write complete sentences and quote the refused value themselves.
    if detail["type"] == "value_error":
        return message.removeprefix("Value error, ")
    return _wrong_value(detail)


def _wrong_value(detail: Any) -> str:
    """What was seen of a value that its type refuses, and what it must be."""
    value = detail["input"]
    if detail["type"] == "string_type" and isinstance(value, NOT_QUOTED):
        read = "null" if value is None else _shown(value)
        return f"must be text, but YAML reads it as {read}. Write it in quotes"
    if value is None:
        return f"is empty; {_must_be(detail)}, or leave it out"
    hint = ""
    if detail["loc"][-1:] == ("type",) and isinstance(value, str) and value in OTHER_TYPES:
        hint = f"; did you mean {OTHER_TYPES[value]}?"
    return f"{_must_be(detail)}; it is {_shown(value)}{hint}"


def _must_be(detail: Any) -> str:
    """What the value of an error must be; pydantic's own words for what has no others here."""
    kind = detail["type"]
    context = {name: _bound(value) for name, value in detail.get("ctx", {}).items()}
    if kind == "string_too_long":
        return f"must have at most {counted(detail['ctx']['max_length'], 'character')}"
    pattern = PATTERNS.get(str(context.get("pattern")))
    if pattern is not None:
        return f"must be {pattern}"
    if kind in MUST:
        return MUST[kind].format(**context)
    for begin, what in MUST_BE.items():
        if kind == begin or (kind.startswith(f"{begin}_") and begin in kind.split("_")[0]):
            return f"must be {what.format(**context)}"
    message = str(detail["msg"]).replace("Input should be", "must be")
    return f"{message[0].lower()}{message[1:]}"


def _wrong_kind(kind: str | None) -> str:
    kinds = ", ".join(KINDS)
    if kind is None:
        return f"is required but not set; it is one of {kinds}"
    near = get_close_matches(kind, KINDS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"must be one of {kinds}; it is {_shown(kind)}{hint}"


def _shown(value: object) -> str:
    """The start of a refused value, for a message; nothing of an address that has a secret."""
    text = repr(value)
    if has_credentials(text):
        return "an address with credentials, which is not shown"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _hint(place: Sequence[str | int], settings: type[BaseModel]) -> str:
    """Advice for the unknown setting at `place`: where it belongs, or what is spelled like it."""
    name = str(place[-1])
    of_kind = f" of kind {place[2]}" if len(place) == 4 and place[0] == "steps" else " here"
    if name in settings.model_fields:
        return f"{of_kind}; write it at the top level"
    for group, field in settings.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if name in getattr(part, "model_fields", {}):
                return f"{of_kind}; set {group}.{name}"
    names = {kind: step.model_json_schema()["properties"].keys() for kind, step in KINDS.items()}
    others = [kind for kind in names if name in names[kind]]
    if others and "steps" in settings.model_fields:
        return f"{of_kind}; steps of kind {' or '.join(others)} have it"
    schema = settings.model_json_schema()
    known: set[str] = set()
    for properties in (schema, *schema["$defs"].values()):
        known |= properties.get("properties", {}).keys()
    near = get_close_matches(name, known - {name}, 1)
    return f"; did you mean {near[0]}?" if near else "; `glmbatch settings` lists all settings"
