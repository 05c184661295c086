"""Loads a file of settings and the overrides of the command line into a settings class.

All errors are reported together in one InputError, one line each with the file and the setting.
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

# Groups that may be a string alone, and the setting that the string then is.
TEXT_ALONE = {"model": "path", "canary": "file"}

# Types that YAML reads unquoted words as: yes, off, 1.0, 012, 2024-01-01, ~.
NOT_QUOTED = (bool, int, float, date, type(None))
MOST_SHOWN = 100

AnySettings = TypeVar("AnySettings", bound=BaseModel)


def load_job(path: str, overrides: Mapping[str, object] | None = None) -> JobConfig:
    """The job in a YAML or JSON file; `overrides` and errors as in `parse_settings`."""
    return load_settings(path, JobConfig, overrides)


def load_settings(
    path: str, kind: type[AnySettings], overrides: Mapping[str, object] | None = None
) -> AnySettings:
    """The settings in a YAML or JSON file; `overrides` and errors as in `parse_settings`."""
    return parse_settings(path, read_settings(Path(path)), kind, overrides)


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
        lines = []
        for detail in error.errors():
            lines.append(f"{where}: {_setting(detail)}: {_reason(detail, kind)}")
        raise InputError("\n".join(lines)) from error


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


def _setting(detail: Any) -> str:
    """The setting with the error, as a person would write it: steps[0].labels."""
    name = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            name += f"[{part}]"
        # After a step's index, pydantic adds its kind, which is not part of the name.
        elif not (name.endswith("]") and part in ("classify", "generate")):
            name += f".{part}" if name else part
    return name or "job"


def _reason(detail: Any, settings: type[BaseModel]) -> str:
    """What is wrong, as the rest of a sentence that began with the setting."""
    if detail["type"] == "missing":
        return "is required but not set"
    if detail["type"] == "extra_forbidden":
        return f"is not a setting; {_hint(str(detail['loc'][-1]), settings)}"
    message = str(detail["msg"])
    # Our own validators write complete sentences and quote the refused value themselves.
    if detail["type"] == "value_error":
        return message.removeprefix("Value error, ")
    value = detail["input"]
    if detail["type"] == "string_type" and isinstance(value, NOT_QUOTED):
        return f"must be text, but YAML reads it as {_shown(value)}. Write it in quotes"
    return f"{message[0].lower()}{message[1:]}; it is {_shown(value)}"


def _shown(value: object) -> str:
    """The start of a refused value, for a message; nothing of an address that has a secret."""
    text = repr(value)
    if has_credentials(text):
        return "an address with credentials, which is not shown"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _hint(name: str, settings: type[BaseModel]) -> str:
    """Advice for an unknown setting `name`: the closest name in any group, or where to look."""
    schema = settings.model_json_schema()
    names: set[str] = set()
    for group in (schema, *schema["$defs"].values()):
        names |= group.get("properties", {}).keys()
    near = get_close_matches(name, names, 1)
    return f"did you mean {near[0]}?" if near else "`glmbatch settings` lists all settings"
