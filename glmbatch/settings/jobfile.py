"""From a file of settings and flags to a `JobConfig`, or other settings.

What is wrong is an InputError that names the file and the setting, a line for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError
from glmbatch.settings.addresses import has_credentials
from glmbatch.settings.job import JobConfig
from glmbatch.settings.reading import read_settings

# Groups that a text alone may stand for, and the setting that the text then is.
TEXT_ALONE = {"model": "path", "canary": "file"}

# What YAML makes of words without quotes: yes, off, 1.0, 012, 2024-01-01, ~.
NOT_QUOTED = (bool, int, float, date, type(None))
MOST_SHOWN = 100

AnySettings = TypeVar("AnySettings", bound=BaseModel)


def load_job(path: str, overrides: Mapping[str, object] | None = None) -> JobConfig:
    """The job of a YAML or JSON file; `overrides` and errors as in `parse_settings`."""
    return load_settings(path, JobConfig, overrides)


def load_settings(
    path: str, kind: type[AnySettings], overrides: Mapping[str, object] | None = None
) -> AnySettings:
    """The settings of a YAML or JSON file; `overrides` and errors as in `parse_settings`."""
    return parse_settings(path, read_settings(Path(path)), kind, overrides)


def parse_settings(
    where: str,
    settings: Mapping[str, Any],
    kind: type[AnySettings],
    overrides: Mapping[str, object] | None = None,
) -> AnySettings:
    """Validate `settings`, after `overrides` (dotted setting to value) have replaced theirs.

    InputError with a line for each thing that is wrong; the lines begin with `where`.
    """
    # `overrides` are set in place, and the caller may use its settings again.
    changed = deepcopy(dict(settings))
    for name, value in (overrides or {}).items():
        _set(changed, name, value)
    try:
        return kind.model_validate(changed)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            lines.append(f"{where}: {_setting(detail)}: {_reason(detail, kind)}")
        raise InputError("\n".join(lines)) from error


def _set(settings: dict[str, Any], name: str, value: object) -> None:
    """Set the dotted `name`; a number in it is a place in a list."""
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
        # An absent group is made: a job file need not name `runtime` for `--device` to work.
        group = group.setdefault(part, {})
    if isinstance(group, list):
        group[_place(group, last, name)] = value
    elif not isinstance(group, dict):
        raise InputError(f"{name}: {'.'.join(parents)} is not a group of settings.")
    else:
        group[last] = value


def _place(items: list[Any], part: str, name: str) -> int:
    """The index that `part` of the dotted `name` stands for."""
    if not part.isdigit() or int(part) >= len(items):
        raise InputError(f"{name}: {part!r} is no place in a list of {len(items)}.")
    return int(part)


def _setting(detail: Any) -> str:
    """The place of an error as a person writes it: steps[0].labels."""
    name = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            name += f"[{part}]"
        # Behind the index of a step, pydantic puts its kind, which is no part of the name.
        elif not (name.endswith("]") and part in ("classify", "generate")):
            name += f".{part}" if name else part
    return name or "job"


def _reason(detail: Any, settings: type[BaseModel]) -> str:
    """What is wrong, as the end of a sentence that began with the setting."""
    if detail["type"] == "missing":
        return "is required and not set"
    if detail["type"] == "extra_forbidden":
        return f"is no setting; {_hint(str(detail['loc'][-1]), settings)}"
    message = str(detail["msg"])
    # Raised by our own validators, whose sentences are whole and quote what they refuse.
    if detail["type"] == "value_error":
        return message.removeprefix("Value error, ")
    value = detail["input"]
    if detail["type"] == "string_type" and isinstance(value, NOT_QUOTED):
        return f"is to be text and is {_shown(value)}, as YAML reads it. Write it in quotes"
    return f"{message[0].lower()}{message[1:]}; it is {_shown(value)}"


def _shown(value: object) -> str:
    """A refused value for a message: its begin, and nothing of an address that holds a secret."""
    text = repr(value)
    if has_credentials(text):
        return "an address with credentials, which is not shown"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _hint(name: str, settings: type[BaseModel]) -> str:
    """The setting that was meant by the unknown `name`, wherever it belongs."""
    schema = settings.model_json_schema()
    names: set[str] = set()
    for group in (schema, *schema["$defs"].values()):
        names |= group.get("properties", {}).keys()
    near = get_close_matches(name, names, 1)
    return f"did you mean {near[0]}?" if near else "glmbatch settings lists them"
