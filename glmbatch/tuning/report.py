"""A run's report as a value, and the names of the files in a run's folder. Renders no text."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError
from glmbatch.tuning.scores import Scores, TextScores
from glmbatch.tuning.split import LabelAudit

RUNS = "runs"
CURRENT = "current"
CHECKPOINT = "checkpoint"
ADAPTER = "adapter"
TRAINER = "trainer"
TRAINED = "trained.json"
LEARNED = "learned.npy"  # keys of the texts trained on, so that no later run tests on them
REPORT = "report.json"
PAGE = "report.html"
CARD = "README.md"
# Those whose version can change a score.
PACKAGES = (
    "glmbatch",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "scikit-learn",
    "sentencepiece",
    "pyarrow",
)


class Trained(BaseModel, frozen=True, extra="forbid"):
    """What training did.

    `history` has its losses and scores by step. `temperature` is folded into the head. Of the
    `learned` rows, which trained or chose the weights, so many texts and answers lost their end.
    """

    steps: int
    best_step: int
    trained_parameters: int
    parameters: int
    temperature: float
    history: tuple[dict[str, float], ...]
    learned: int = 0
    cut_texts: int = 0
    cut_answers: int = 0


class Mistake(BaseModel, frozen=True, extra="forbid"):
    """A held-out row with a wrong answer, and the probability that the model gave it."""

    place: str
    text: str
    label: str
    predicted: str
    confidence: float


class Report(BaseModel, frozen=True, extra="forbid"):
    """What a run made, how good it is, and whether it was promoted; `reason` says why or why not.

    `baseline` is for classifiers alone. `current` has the scores, on the same rows, of the
    checkpoint promoted before: that of the run `compared_with`.
    """

    run: str
    checkpoint: str
    labels: tuple[str, ...]
    settings: dict[str, Any]
    base: str
    audit: LabelAudit
    training: dict[str, Any]
    scores: Scores | TextScores
    mistakes: tuple[Mistake, ...]
    baseline_name: str
    baseline: Scores | None
    current: Scores | TextScores | None
    compared_with: str | None
    promoted: bool
    reason: str
    versions: Mapping[str, str]


def read_report(run: Path) -> Report | None:
    """The report in folder `run`, None where there is none. InputError for a damaged one."""
    path = run / REPORT
    try:
        return Report.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError as error:
        raise InputError(
            f"{path}: is not a report of glmbatch: {error.errors()[0]['msg']}. Remove it."
        ) from error


def installed_versions() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
