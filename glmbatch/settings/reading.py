"""The mapping in a file of settings: YAML or JSON, read strictly. What is wrong is one line.

What both formats let pass in silence is refused here: a key given twice, and anything that would
take ages to read. No code of a file is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from glmbatch.errors import InputError

# A job of a thousand labels and long prompts has some 100 KB; YAML is read at 100 KB a second.
MOST_BYTES = 1 << 20
# Values after each alias has been replaced by what it stands for, which may double at every level.
MOST_VALUES = 100_000
# Characters of a parser's message, which may quote a line of the file.
MOST_REASON = 200


class RefusedSettings(ValueError):
    """What both formats allow, and settings do not."""


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. InputError when there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path}: the job file cannot be read: {reason}.") from error
    if len(content) > MOST_BYTES:
        raise InputError(
            f"{path}: holds more than {MOST_BYTES >> 20} MB, which no job file does. "
            "Give a file of settings."
        )
    settings = _parsed(path, text)
    if not isinstance(settings, dict):
        kind = {type(None): "nothing", list: "a list"}.get(type(settings), "a single value")
        raise InputError(
            f"{path}: holds no settings: it holds {kind}. Write names with values, as the README "
            "shows."
        )
    return settings


def _parsed(path: Path, text: str) -> Any:
    try:
        return _json(text) if text.lstrip().startswith("{") else parse_yaml(text)
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deep for settings.") from error
    except RefusedSettings as error:
        raise InputError(f"{path}: {error}.") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        # The parser's message spans several lines; a user sees one for each thing that is wrong.
        reason = " ".join(str(error).split())[:MOST_REASON].rstrip(".")
        raise InputError(f"{path}: is neither YAML nor JSON: {reason}.") from error


def _json(text: str) -> Any:
    """The value of a JSON text, or of a YAML one that begins like JSON."""
    # JSON is nearly YAML, but not with tabs, and not with characters beyond 16 bits.
    try:
        return json.loads(text, object_pairs_hook=_unrepeated)
    except ValueError as error:
        try:
            return parse_yaml(text)  # which knows the line
        except yaml.YAMLError:
            if isinstance(error, json.JSONDecodeError):
                raise
            raise error from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. YAMLError, ValueError or RecursionError when it is none."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise RefusedSettings(f"its aliases stand for more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RefusedSettings(f"{repeated!r} is given twice; keep one")
    return values


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which makes no objects of a file's choice; a key stands once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._looked_at: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Before `<<` brings in the keys of another mapping, which a key here may replace.
        if id(node) in self._looked_at:
            return
        self._looked_at.add(id(node))
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise RefusedSettings(
                        f"line {line}: {key.value!r} is given twice, in line {lines[name]} too; "
                        "keep one"
                    )
                lines[name] = line
        super().flatten_mapping(node)
        # Each key once, as it is in the end: of two that are merged elsewhere PyYAML takes the
        # first, which a key of this mapping has replaced.
        pairs: dict[object, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            is_scalar = isinstance(key, yaml.ScalarNode)
            pairs[(key.tag, key.value) if is_scalar else id(key)] = (key, value)
        node.value = list(pairs.values())


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values in `node` with all aliases written out. RefusedSettings for one that holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    size = sizes.get(id(node))
    if size == 0:
        raise RefusedSettings(
            f"line {node.start_mark.line + 1}: an alias stands for what it is part of"
        )
    if size is None:
        sizes[id(node)] = 0  # while it is being counted
        size = 1
        for item in node.value:
            parts = item if isinstance(item, tuple) else (item,)
            size += sum(_size(part, sizes) for part in parts)
        sizes[id(node)] = size
    return size
