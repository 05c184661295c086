"""The report of a training as a value, and the names of the files in a run's folder.

Renders no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError
from glmbatch.evaluation.paired import Paired
from glmbatch.settings.job import ModelConfig
from glmbatch.tuning.scores import Scores, SelectionScores, TextScores
from glmbatch.tuning.split import LabelAudit

RUNS = "runs"
CURRENT = "current"
CHECKPOINT = "checkpoint"
ADAPTER = "adapter"
BASELINE = "baseline"
TRAINER = "trainer"
TRAINED = "trained.json"
PROGRESS = "progress.json"  # in TRAINER: how many steps are taken
LEARNED = "learned.npy"  # keys of the learned texts, so that no later run tests on them
REPORT = "report.json"
PAGE = "report.html"
CARD = "README.md"
AnyScores = Scores | SelectionScores | TextScores
# Packages whose version can change a score.
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
    """The result of a training.

    history      losses and scores by step
    temperature  divisor of the logits, already folded into the head
    learned      number of training and validation rows
    cut_texts    how many of those lost the end of their text
    cut_answers  how many of those lost the end of their answer
    used         values that no setting gave: rates, steps, decay, how weights are stored
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
    used: Mapping[str, int | float | str] = {}


class TrainingPlan(BaseModel, frozen=True, extra="forbid"):
    """What a training would do.

    `tokens` has those of the shortest, the median and the longest row with its answer, and `cut`
    how many texts and answers lose their end. `settings` are those used. An epoch has `mixed` texts
    beside the rows. `advice` says what to change for a better result; it may be empty.
    """

    audit: LabelAudit
    settings: dict[str, Any]
    tokens: tuple[int, int, int]
    cut: tuple[int, int]
    steps: int
    mixed: int = 0
    advice: str = ""
    run: str = ""
    is_trained: bool = False
    current: str | None = None


class Mistake(BaseModel, frozen=True, extra="forbid"):
    """A held-out row with a wrong answer, and the probability that the model gave that answer."""

    place: str
    text: str
    label: str
    predicted: str
    confidence: float


class Comparison(BaseModel, frozen=True, extra="forbid"):
    """The run beside another that answered the same test rows, by the score that decides.

    `needed` says whether the run must beat it to be promoted.
    """

    rival: Literal["constant", "base", "current", "baseline"]
    name: str
    test: Paired
    needed: bool = False


class Report(BaseModel, frozen=True, extra="forbid"):
    """The report of a training run.

    `baseline` exists only for classifiers; jobs find it in the folder `baseline_model`. `current`
    has the scores of the previously promoted checkpoint, of the run `compared_with`, on the same
    rows. `untrained` has those of the model before the training; without them, `untrained_note`
    says why. `comparisons` decide; reports of earlier versions have none. `reason` explains
    `promoted`.
    """

    run: str
    checkpoint: str
    labels: tuple[str, ...]
    settings: dict[str, Any]
    base: str
    audit: LabelAudit
    training: dict[str, Any]
    scores: AnyScores
    mistakes: tuple[Mistake, ...]
    baseline_name: str
    baseline: Scores | SelectionScores | None
    baseline_model: str | None = None
    current: AnyScores | None
    compared_with: str | None
    untrained: AnyScores | None = None
    untrained_note: str = ""
    comparisons: tuple[Comparison, ...] = ()
    promoted: bool
    reason: str
    versions: Mapping[str, str]

    @property
    def promoted_by(self) -> str:
        """Name of the score that decides the promotion, a field of `scores`."""
        by_kind = {Scores: "accuracy", SelectionScores: "micro_f1", TextScores: "rouge_l"}
        return self.settings.get("metric") or by_kind[type(self.scores)]


def read_report(run: Path) -> Report | None:
    """The report in folder `run`; None if there is none. InputError if it is damaged."""
    path = run / REPORT
    try:
        return Report.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError as error:
        raise InputError(
            f"{path}: is not a valid report: {error.errors()[0]['msg']}. Remove it."
        ) from error


def learned_lists(model: ModelConfig) -> list[Path]:
    """The files with the keys of the texts that a local checkpoint and its adapter learned."""
    folders = {Path(path).resolve().parent for path in (model.path, model.adapter) if path}
    lists = [folder / LEARNED for folder in sorted(folders)]
    return [path for path in lists if path.is_file()]


def installed_versions() -> dict[str, str]:
    """The installed versions of PACKAGES, by name."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
