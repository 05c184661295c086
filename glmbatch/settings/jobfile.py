"""From a file of settings and flags to a `JobConfig`, or other settings, with errors that name file and setting."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError
from glmbatch.settings.job import JobConfig

# Groups that a text alone may stand for, and the setting that it is.
TEXT_ALONE = {"model": "path", "canary": "file"}

AnySettings = TypeVar("AnySettings", bound=BaseModel)


def load_job(path: str, overrides: Mapping[str, object] | None = None) -> JobConfig:
    """The job of a YAML or JSON file; else as `load_settings`."""
    return load_settings(path, JobConfig, overrides)


def load_settings(
    path: str, kind: type[AnySettings], overrides: Mapping[str, object] | None = None
) -> AnySettings:
    """The settings of a YAML or JSON file; else as `parse_settings`."""
    return parse_settings(path, _read(Path(path)), kind, overrides)


def parse_settings(
    where: str,
    settings: Mapping[str, Any],
    kind: type[AnySettings],
    overrides: Mapping[str, object] | None = None,
) -> AnySettings:
    """The `settings` that errors name by `where`, with `overrides` (dotted setting to value) in place of what they say.

    InputError with a line for each thing that is wrong.
    """
    changed = deepcopy(dict(settings))
    for name, value in (overrides or {}).items():
        _set(changed, name, value)
    try:
        return kind.model_validate(changed)
    except ValidationError as error:
        lines = (f"{where}: {_setting(each)}: {_seen(each, kind)}" for each in error.errors())
        raise InputError("\n".join(lines)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: the job file cannot be read: {reason}.") from error
    except yaml.YAMLError as error:
        raise InputError(
            f"{path}: is neither YAML nor JSON: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: holds no settings.")
    return settings


def _set(settings: dict[str, Any], name: str, value: object) -> None:
    """Set the dotted `name`; a number in it is a place in a list."""
    *parents, last = name.split(".")
    here: Any = settings
    for depth, part in enumerate(parents):
        if isinstance(here, list):
            here = here[_place(here, part, name)]
            continue
        if not isinstance(here, dict):
            raise InputError(f"{name}: {'.'.join(parents[:depth])} is not a group of settings.")
        if part in TEXT_ALONE and isinstance(here.get(part), str):
            here[part] = {TEXT_ALONE[part]: here[part]}
        here = here.setdefault(part, {})
    if isinstance(here, list):
        here[_place(here, last, name)] = value
    elif not isinstance(here, dict):
        raise InputError(f"{name}: {'.'.join(parents)} is not a group of settings.")
    else:
        here[last] = value


def _place(items: list[Any], part: str, name: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise InputError(f"{name}: {part!r} is no place in a list of {len(items)}.")
    return int(part)


def _setting(error: Any) -> str:
    """The place of an error as a person writes it: steps[0].labels."""
    name = ""
    for part in error["loc"]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not (
            name.endswith("]") and part in ("classify", "generate")
        ):  # pydantic's tag of the kind of step
            name += f".{part}" if name else part
    return name or "job"


def _seen(error: Any, settings: type[BaseModel]) -> str:
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return "is required and not set"
    if kind == "extra_forbidden":
        schema = settings.model_json_schema()
        names = {
            name
            for each in (schema, *schema["$defs"].values())
            for name in each.get("properties", {})
        }
        near = get_close_matches(str(error["loc"][-1]), names, 1)
        return "is no setting; " + (
            f"did you mean {near[0]}?" if near else "glmbatch settings lists them"
        )
    if kind == "value_error":
        return str(message)
    return f"{message[0].lower()}{message[1:]}; it is {error['input']!r}"
