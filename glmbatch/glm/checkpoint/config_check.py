"""Reading the keys of a config.json that is not believed: each value has its kind and bounds. No tensors, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ConfigCheck:
    """Reads keys of one config; what it refuses it notes, naming file and key, and goes on with a stand-in."""

    config: Mapping[str, Any]
    where: str
    problems: list[str] = field(default_factory=list)

    def refuse(self, key: str, wanted: str) -> None:
        seen = f"is {repr(self.config[key])[:60]}" if key in self.config else "is missing"
        self.problems.append(f"{self.where}: {key!r} {seen}; it must be {wanted}.")

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> int:
        value = _given(self.config.get(key), default)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        self.refuse(key, f"an integer from {least} to {most}")
        return most

    def real(self, key: str, most: float, default: float | None = None) -> float:
        value = _given(self.config.get(key), default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most:
            return float(value)
        self.refuse(key, f"a number above 0 and at most {most:g}")
        return most

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = _given(self.config.get(key), default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """The value of `key`, which may be absent if there is a default."""
        value = _given(self.config.get(key), default)
        if value in allowed:
            return allowed[allowed.index(value)]
        if value is None or value != default:
            self.refuse(key, f"one of {', '.join(map(str, allowed))}")
        return default

    def fixed(self, key: str, wanted: object) -> None:
        if self.config.get(key, wanted) != wanted:
            self.refuse(key, f"{wanted}: the GLM classes have no counterpart to anything else")

    def labels(self) -> tuple[str, ...]:
        """Names of the head's rows in order; transformers' own default names when the config has none."""
        named = self.config.get("id2label")
        if named is None:
            return tuple(
                f"LABEL_{row}" for row in range(self.integer("num_labels", 1, 2**16, default=2))
            )
        rows = [str(row) for row in range(len(named))] if isinstance(named, dict) else []
        if (
            not rows
            or named.keys() != set(rows)
            or not all(isinstance(name, str) for name in named.values())
        ):
            self.refuse("id2label", 'an object {"0": label, "1": label, ...} without a gap')
            return ()
        labels = tuple(named[row] for row in rows)
        if len(set(labels)) != len(labels):
            self.refuse("id2label", "free of repeated labels")
        if self.config.get("num_labels", len(labels)) != len(labels):
            self.refuse("num_labels", f"{len(labels)}, the number of labels in 'id2label'")
        return labels


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
