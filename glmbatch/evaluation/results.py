"""What an evaluation found, as values. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

from glmbatch.tuning.scores import LabelScore, Scores, TextScores

Interval = tuple[float, float]


class Counts(BaseModel, frozen=True, extra="forbid"):
    """Where the rows of a step are: each is in exactly one of these.

    Only the `scored` rows have both a truth and an answer, and only they decide the numbers.
    `failed` has the rows with an error, by its type.
    """

    rows: int
    scored: int
    without_truth: int = 0
    not_asked: int = 0
    abstained: int = 0
    failed: Mapping[str, int] = {}


class Coverage(BaseModel, frozen=True, extra="forbid"):
    """The rows whose answers are right in the share `precision`, also among other rows.

    They have a confidence of at least `threshold`, which is what `abstain_below` is set to; None if
    no threshold is sure enough. `covered` is their share of the scored rows, and `measured` the
    share of them that is right here.
    """

    precision: float
    threshold: float | None
    covered: float
    measured: float | None


class LabelResult(Scores, frozen=True, extra="forbid"):
    """How well one label for each row was chosen. `intervals` are of 95 %, by number."""

    kind: Literal["labels"] = "labels"
    coverage: tuple[Coverage, ...] = ()
    unknown_truths: Mapping[str, int] = {}  # rows by truths that are no label of the step
    intervals: Mapping[str, Interval] = {}


class SeveralResult(BaseModel, frozen=True, extra="forbid"):
    """How well several labels for a row were chosen.

    `exact_match` is the share of rows whose labels are all right. `micro` counts each label of each
    row once; `macro_f1` is the mean over the labels that occur in the truth or the answers. `ece`
    and `bins` are over all labels of all rows: how probable a label is, and how often it applies.
    """

    kind: Literal["several labels"] = "several labels"
    rows: int
    exact_match: float
    micro_precision: float
    micro_recall: float
    micro_f1: float
    macro_f1: float
    labels: Mapping[str, LabelScore]
    ece: float
    bins: tuple[tuple[int, float, float], ...]
    unknown_truths: Mapping[str, int] = {}
    intervals: Mapping[str, Interval] = {}


class TextResult(TextScores, frozen=True, extra="forbid"):
    """How close written texts are to the expected ones.

    `rouge_l_words` is ROUGE-L over words of a-z and 0-9 in lower case, for the rows whose expected
    text has one; None if there are none. `chrf` is from 0 to 100, over all texts together (Popović,
    2015).
    """

    kind: Literal["text"] = "text"
    rouge_l_words: float | None
    chrf: float
    coverage: tuple[Coverage, ...] = ()
    intervals: Mapping[str, Interval] = {}


class ValueResult(BaseModel, frozen=True, extra="forbid"):
    """How often a value is right, and for numbers how far off it is on average.

    The error is the mean over rows that have both numbers; None if there are none.
    """

    kind: Literal["value"] = "value"
    rows: int
    exact_match: float
    mean_absolute_error: float | None = None
    coverage: tuple[Coverage, ...] = ()
    intervals: Mapping[str, Interval] = {}


class ListResult(BaseModel, frozen=True, extra="forbid"):
    """How well the items of lists agree, whatever their order; over the items of all rows."""

    kind: Literal["list"] = "list"
    rows: int
    exact_match: float
    precision: float
    recall: float
    f1: float
    coverage: tuple[Coverage, ...] = ()
    intervals: Mapping[str, Interval] = {}


Result = LabelResult | SeveralResult | TextResult | ValueResult | ListResult


class StepResult(BaseModel, frozen=True, extra="forbid"):
    """The numbers of one step.

    `truth` maps what is scored to the column with its truth: the step itself, or each field of an
    extract step. `results` has the same names. For fields, `exact_match` is the share of rows whose
    fields are all right, and `abstained` counts the rows that a field lacks because the model was
    not sure of it. `computed` answers were asked now, for so many tokens; the others were known.
    `note` says why nothing could be scored.
    """

    step: str
    truth: Mapping[str, str]
    counts: Counts
    results: Mapping[str, Result]
    exact_match: float | None = None
    abstained: Mapping[str, int] = {}
    computed: int
    prompt_tokens: int
    completion_tokens: int
    note: str | None = None


class Evaluation(BaseModel, frozen=True, extra="forbid"):
    """The numbers of a job over labelled rows. `kept` is the folder with the answers."""

    rows: int
    steps: tuple[StepResult, ...]
    kept: str
    seconds: float
