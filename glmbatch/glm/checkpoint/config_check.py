"""Reads the keys of an untrusted config, checking the type and bounds of each value.

No tensors, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# One of several labels, each label by itself, or a number.
Predicts = Literal["label", "labels", "number"]
PROBLEM_TYPES: Mapping[Predicts, str] = {
    "label": "single_label_classification",
    "labels": "multi_label_classification",
    "number": "regression",
}
# What each value of a key means, in the order in which the keys count.
_MEANINGS: Mapping[str, Mapping[str, Predicts]] = {
    "problem_type": {problem: predicts for predicts, problem in PROBLEM_TYPES.items()},
    "function_to_apply": {"softmax": "label", "sigmoid": "labels", "none": "number"},
}
# Far above any head. Keeps a mistyped number from creating millions of names.
_MAX_LABELS = 2**16


@dataclass(frozen=True, slots=True)
class ConfigCheck:
    """Reads the keys of one config and collects every fault in `problems`.

    A refused value is replaced by a valid placeholder, so that one pass finds all problems. `where`
    names the config in them. A key that is absent or null has its default; without a default, that
    is a problem.
    """

    config: Mapping[str, Any]
    where: str
    problems: list[str] = field(default_factory=list)

    def refuse(self, key: str, wanted: str) -> None:
        """Add the problem that the value of `key` must be `wanted`."""
        stated = f"is {repr(self.config[key])[:60]}" if key in self.config else "is missing"
        self.problems.append(f"{self.where}: {key!r} {stated}; it must be {wanted}.")

    def integer(self, key: str, minimum: int, maximum: int, default: int | None = None) -> int:
        """The integer under `key`, from `minimum` to `maximum`."""
        value = self._value(key, default)
        # bool is a subclass of int, but `true` is not a number.
        if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum:
            return value
        self.refuse(key, f"an integer from {minimum} to {maximum}")
        return maximum

    def real(self, key: str, maximum: float, default: float | None = None) -> float:
        """The number under `key`, above 0 and at most `maximum`."""
        value = self._value(key, default)
        # This also refuses nan and infinity, which Python's JSON reader accepts.
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= maximum:
            return float(value)
        self.refuse(key, f"a number above 0 and at most {maximum:g}")
        return maximum

    def flag(self, key: str, default: bool | None = None) -> bool:
        """The boolean under `key`."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """The value of `key`, which must be one of `allowed`."""
        value = self._value(key, default)
        if value in allowed:
            return allowed[allowed.index(value)]  # 4.0 becomes 4
        if value is None or value != default:
            self.refuse(key, f"one of {', '.join(map(str, allowed))}")
        return default

    def fixed(self, key: str, wanted: object) -> None:
        """Refuse any value of `key` except `wanted`; the key may be absent."""
        if self.config.get(key, wanted) != wanted:
            self.refuse(key, f"{wanted}: transformers' GLM classes support nothing else")

    def labels(self) -> tuple[str, ...]:
        """The label of each row of the head, in order, from 'id2label'.

        Without that key, transformers' default names for 'num_labels' rows, or for two.
        """
        stated = self.config.get("id2label")
        if stated is None:
            return default_labels(self.integer("num_labels", 1, _MAX_LABELS, default=2))
        rows = [str(row) for row in range(len(stated))] if isinstance(stated, dict) else []
        if not rows or stated.keys() != set(rows) or not _all_strings(stated.values()):
            self.refuse("id2label", 'an object {"0": label, "1": label, ...} without a gap')
            return ()
        labels = tuple(stated[row] for row in rows)
        if len(set(labels)) != len(labels):
            self.refuse("id2label", "free of repeated labels")
        if self.config.get("num_labels", len(labels)) != len(labels):
            self.refuse("num_labels", f"{len(labels)}, the number of labels in 'id2label'")
        return labels

    def _value(self, key: str, default: Any) -> Any:
        # transformers writes null for a key that is not set.
        value = self.config.get(key)
        return default if value is None else value


def head_predicts(config: Mapping[str, Any], rows: int, where: str) -> tuple[Predicts, list[str]]:
    """What a head of `rows` rows was trained to predict, and every problem with what config says.

    As in transformers, 'problem_type' says so, or else 'function_to_apply'; without both, a single
    row is a number, and several are labels to choose from.
    """
    stated: set[Predicts] = set()
    for key, meanings in _MEANINGS.items():
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or value not in meanings:
            known = ", ".join(meanings)
            return "label", [f"{where}: {key!r} is {str(value)[:60]!r}; it must be one of {known}."]
        stated.add(meanings[value])
    if len(stated) > 1:
        return "label", [
            f"{where}: 'problem_type' is {config['problem_type']!r} and 'function_to_apply' "
            f"{config['function_to_apply']!r}, which do not go together. Remove the wrong one."
        ]
    predicts = stated.pop() if stated else "number" if rows == 1 else "label"
    if predicts == "number" and rows > 1:
        return predicts, [
            f"{where}: the head predicts {rows} numbers at once (regression). Set model.path to "
            "one that predicts a single number."
        ]
    if predicts == "label" and rows == 1:
        return predicts, [
            f"{where}: the head has one row, so it cannot choose among labels. Set model.path to "
            "one whose head has two labels or more."
        ]
    return predicts, []


def default_labels(count: int) -> tuple[str, ...]:
    """transformers' default labels for a head of `count` rows: LABEL_0, LABEL_1, ..."""
    return tuple(f"LABEL_{row}" for row in range(count))


def _all_strings(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)
