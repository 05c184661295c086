"""A TF-IDF classifier on disk: its files, their checks and digest. Needs no torch and no training.

Shapes: F n-grams, L labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.config_check import PROBLEM_TYPES, Predicts
from glmbatch.glm.files import digest_file, read_json

KIND = "glmbatch-tfidf"  # the model_type in config.json; no model of transformers has it
CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
WEIGHTS = "model.safetensors"
Units = Literal["words", "characters"]


@dataclass(frozen=True)
class TfidfModel:
    """TF-IDF of n-grams and a logistic regression over them.

    `vocabulary` has the n-grams in the order of their ids, and `lengths` the least and the greatest
    number of `units` in one. A text's TF is 1 + log(count), and its vector has length 1.
    """

    units: Units
    lengths: tuple[int, int]
    vocabulary: Sequence[str]
    labels: tuple[str, ...]
    predicts: Predicts
    idf_F: np.ndarray
    weights_FL: np.ndarray  # a row for each n-gram, because a text reads only those of its own
    bias_L: np.ndarray

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return f"TF-IDF of {self.units} and logistic regression, no language model"

    @property
    def parameters(self) -> int:
        """The number of learned numbers."""
        return self.idf_F.size + self.weights_FL.size + self.bias_L.size


def is_tfidf(directory: str | Path) -> bool:
    """Whether the model in `directory` says that it is one of these. False if it says nothing."""
    try:
        return bool(read_json(Path(directory) / CONFIG).get("model_type") == KIND)
    except InputError:
        return False


def save_tfidf(model: TfidfModel, directory: Path) -> None:
    """Write `model` into `directory`, which exists."""
    from safetensors.numpy import save

    config: dict[str, Any] = {
        "model_type": KIND,
        "units": model.units,
        "lengths": model.lengths,
        "id2label": dict(enumerate(model.labels)),
    }
    if model.predicts != "label":
        config["problem_type"] = PROBLEM_TYPES[model.predicts]
    arrays = {"idf": model.idf_F, "weights": model.weights_FL, "bias": model.bias_L}
    single = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    (directory / WEIGHTS).write_bytes(save(single))
    (directory / VOCABULARY).write_text(_as_json(list(model.vocabulary)), encoding="utf-8")
    (directory / CONFIG).write_text(_as_json(config), encoding="utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)


def load_tfidf(directory: str | Path) -> TfidfModel:
    """The model in `directory`. InputError if a file is missing, damaged or of another model."""
    folder = Path(directory)
    config = read_json(folder / CONFIG)
    vocabulary = _vocabulary(folder / VOCABULARY)
    arrays = _arrays(folder / WEIGHTS)
    try:
        numbered = {int(number): str(label) for number, label in config["id2label"].items()}
        labels = tuple(numbered[number] for number in range(len(numbered)))
        units, (least, most) = config["units"], config["lengths"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / CONFIG, f"{type(error).__name__} at {error}") from error
    if units not in get_args(Units) or not 0 < least <= most:
        raise _damaged(folder / CONFIG, f"{units!r} of {least} to {most}")
    shapes: dict[str, tuple[int, ...]] = {
        "idf": (len(vocabulary),),
        "bias": (len(labels),),
        "weights": (len(vocabulary), len(labels)),
    }
    for name, shape in shapes.items():
        shown = list(arrays[name].shape) if name in arrays else "missing"
        if name not in arrays or arrays[name].shape != shape:
            raise _damaged(folder / WEIGHTS, f"{name} is {shown}, not {list(shape)}")
        if not np.isfinite(arrays[name]).all():
            raise _damaged(folder / WEIGHTS, f"{name} has values that are not finite")
    several = config.get("problem_type") == PROBLEM_TYPES["labels"]
    return TfidfModel(
        units=cast(Units, units),
        lengths=(least, most),
        vocabulary=vocabulary,
        labels=labels,
        predicts="labels" if several else "label",
        idf_F=arrays["idf"],
        weights_FL=arrays["weights"],
        bias_L=arrays["bias"],
    )


def _vocabulary(file: Path) -> list[str]:
    try:
        grams = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(file, type(error).__name__) from error
    if not isinstance(grams, list) or not all(isinstance(gram, str) for gram in grams):
        raise _damaged(file, "it is no list of texts")
    return grams


def _arrays(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: dict[str, np.ndarray] = load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise _damaged(file, str(error)) from error
    return arrays


def _damaged(file: Path, fault: str) -> InputError:
    return InputError(
        f"{file}: the TF-IDF model is incomplete or damaged ({fault}). Copy it again."
    )


def digest_tfidf(directory: str | Path) -> str:
    """SHA-256 in hex of all that decides the answers of the model in `directory`."""
    files = [Path(directory) / name for name in (CONFIG, VOCABULARY, WEIGHTS)]
    digests = "\n".join(digest_file(file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()
