"""Reads a file of settings strictly, as YAML or JSON. Each error is one line.

Some files are refused although both formats allow them: those that set a key twice, and those that
would take very long to read. No code in a file is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from glmbatch.errors import InputError

# A job with a thousand labels and long prompts has about 100 KB; YAML is read at 100 KB a second.
MOST_BYTES = 1 << 20
# Values after expanding all aliases, which may double the number at every level.
MOST_VALUES = 100_000
# Characters of a parser's message, which may quote a long line of the file.
MOST_REASON = 200


class RefusedSettings(ValueError):
    """The file is valid YAML or JSON, but not a valid file of settings."""


def read_settings(path: Path, what: str = "job file") -> dict[str, Any]:
    """The mapping in a YAML or JSON file. InputError if it cannot be read or is not a mapping.

    `what` it is said to be in messages.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        origin = "" if path.is_absolute() else f" (from {Path.cwd()})"
        raise InputError(f"{path}: there is no {what}{origin}. Check the path.") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: the {what} cannot be read: {reason}.") from error
    if len(content) > MOST_BYTES:
        raise InputError(
            f"{path}: is larger than {MOST_BYTES >> 20} MB, so it cannot be a {what}. "
            "Check the path."
        )
    settings = _parsed(path, text)
    if not isinstance(settings, dict):
        kind = {type(None): "nothing", list: "a list"}.get(type(settings), "a single value")
        raise InputError(
            f"{path}: expected settings, but the file contains {kind}. "
            "Write `name: value` pairs, as in docs/jobs.md."
        )
    return settings


def _parsed(path: Path, text: str) -> Any:
    try:
        return _json(text) if text.lstrip().startswith("{") else parse_yaml(text)
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply for a file of settings.") from error
    except RefusedSettings as error:
        raise InputError(f"{path}: {error}.") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        # The parser's message spans several lines; every error we report is one line.
        reason = " ".join(str(error).split())[:MOST_REASON].rstrip(".")
        raise InputError(f"{path}: is neither YAML nor JSON: {reason}.") from error


def _json(text: str) -> Any:
    """The value of a JSON text, or of a YAML text that begins like JSON."""
    # JSON is almost a subset of YAML, except for tabs and characters beyond 16 bits.
    try:
        return json.loads(text, object_pairs_hook=_unrepeated)
    except ValueError as error:
        try:
            return parse_yaml(text)  # its errors name the line
        except yaml.YAMLError:
            if isinstance(error, json.JSONDecodeError):
                raise
            raise error from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. YAMLError, ValueError or RecursionError if it cannot be parsed."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise RefusedSettings(f"its aliases expand to more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RefusedSettings(f"{repeated!r} is set twice; keep one")
    return values


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds only plain values, and which refuses a repeated key."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._looked_at: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Runs before `<<` merges another mapping, whose keys may be overridden here.
        if id(node) in self._looked_at:
            return
        self._looked_at.add(id(node))
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise RefusedSettings(
                        f"line {line}: {key.value!r} is set twice, first in line {lines[name]}; "
                        "keep one"
                    )
                lines[name] = line
        super().flatten_mapping(node)
        # Keep only the last value of each key. PyYAML would keep the first when this mapping is
        # merged elsewhere, and that is the one that a key of this mapping overrides.
        pairs: dict[object, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            is_scalar = isinstance(key, yaml.ScalarNode)
            pairs[(key.tag, key.value) if is_scalar else id(key)] = (key, value)
        node.value = list(pairs.values())


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values in `node` with all aliases expanded.

    RefusedSettings if an alias refers to a value that contains it.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    size = sizes.get(id(node))
    if size == 0:
        raise RefusedSettings(
            f"line {node.start_mark.line + 1}: an alias refers to a value that contains it"
        )
    if size is None:
        sizes[id(node)] = 0  # while it is being counted
        size = 1
        for item in node.value:
            parts = item if isinstance(item, tuple) else (item,)
            size += sum(_size(part, sizes) for part in parts)
        sizes[id(node)] = size
    return size
