"""What an evaluation found, as values. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from glmbatch.steps.calibration import Fitted
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
    """How well one label for each row was chosen. `intervals` are of 95 %, by number.

    `by_label` has the coverage of the rows that each label was the answer to.
    """

    kind: Literal["labels"] = "labels"
    coverage: tuple[Coverage, ...] = ()
    by_label: Mapping[str, tuple[Coverage, ...]] = {}
    unknown_truths: Mapping[str, int] = {}  # rows by truths that are no label of the step
    intervals: Mapping[str, Interval] = {}


class SeveralResult(BaseModel, frozen=True, extra="forbid"):
    """How well several labels for a row were chosen.

    `exact_match` is the share of rows whose labels are all right. `micro` counts each label of each
    row once; `macro_f1` is the mean over the labels that occur in the truth or the answers. `ece`
    and `bins` are over all labels of all rows: how probable a label is, and how often it applies.
    `by_label` has the coverage of the rows by the probability of each label; its thresholds are
    those of the setting `threshold`.
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
    by_label: Mapping[str, tuple[Coverage, ...]] = {}
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
    fields are all right. `abstained` counts the scored rows that a field lacks because the model
    was not sure of it, and `without_truth` those whose truth of the field is not known. `computed`
    answers were asked now, for so many tokens; the others were known. `note` says why nothing could
    be scored. `calibration` has the maps that were fitted, by the step or by its fields or labels,
    and `uncalibrated` the number of texts of those with too few. The checkpoint was trained on
    `learned` of the scored rows, which makes the numbers too good.
    """

    step: str
    truth: Mapping[str, str]
    counts: Counts
    results: Mapping[str, Result]
    exact_match: float | None = None
    abstained: Mapping[str, int] = {}
    without_truth: Mapping[str, int] = {}
    learned: int = 0
    computed: int
    prompt_tokens: int
    completion_tokens: int
    note: str | None = None
    calibration: Mapping[str, Fitted] = {}
    uncalibrated: Mapping[str, int] = {}


class Evaluation(BaseModel, frozen=True, extra="forbid"):
    """The numbers of a job over labelled rows.

    `left_out` steps have no truth, and no other step needs their answers: they were not asked.
    `kept` is the folder with the answers, and `calibrated` the file with the calibration, if any.
    """

    rows: int
    steps: tuple[StepResult, ...]
    left_out: tuple[str, ...] = ()
    kept: str
    calibrated: str | None = None
    seconds: float


class NumberPair(BaseModel, frozen=True, extra="forbid"):
    """One number of both jobs over the same rows.

    `difference` is `b` less `a`. `interval` is that of the difference, of 95 %; `p` says how often
    chance alone makes a difference so large. Both are from draws of the texts, and None if the
    number does not exist in every draw.
    """

    a: float
    b: float
    difference: float
    interval: Interval | None = None
    p: float | None = None


class PairedNumbers(BaseModel, frozen=True, extra="forbid"):
    """Both jobs over the `rows` that have a truth and an answer of each.

    `only_a` rows are right with A alone, `only_b` rows with B alone. `p` is that of McNemar's exact
    test over texts: how often texts so one-sided, or more so, occur if neither job is better.
    """

    rows: int
    only_a: int
    only_b: int
    p: float
    numbers: Mapping[str, NumberPair]


class LabelMoves(BaseModel, frozen=True, extra="forbid"):
    """The rows with one label in each job, and the share of A's rows that B answers otherwise."""

    a: int
    b: int
    moved: float


class Moved(BaseModel, frozen=True, extra="forbid"):
    """The `share` of the `rows` answered by both jobs whose answers differ.

    For answers with one label of a set, `labels` has the rows of each, and `moves` counts rows by
    the label of A, then that of B, where they differ.
    """

    rows: int
    differ: int
    share: float
    labels: Mapping[str, LabelMoves] = {}
    moves: Mapping[str, Mapping[str, int]] = {}


class Part(BaseModel, frozen=True, extra="forbid"):
    """What is compared of a step: its answers, or one of its fields. `paired` needs a truth.

    `only_a` rows have an answer of A alone, `only_b` rows of B alone.
    """

    moved: Moved
    only_a: int
    only_b: int
    paired: PairedNumbers | None = None


class Cost(BaseModel, frozen=True, extra="forbid"):
    """What the answers to these rows took when each prompt was first asked, by whichever job.

    Of a run that asked about other rows too, it is the share of these. `now` and `tokens_now` count
    what this comparison asked.
    """

    prompts: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    now: int
    tokens_now: int


class StepComparison(BaseModel, frozen=True, extra="forbid"):
    """One step of both jobs. `parts` are named by the step, or by each field of an extract step.

    `learned` counts the rows that the checkpoint of A and that of B were trained on. `note` says
    why nothing could be compared.
    """

    step: str
    truth: Mapping[str, str] = {}
    parts: Mapping[str, Part] = {}
    learned: tuple[int, int] = (0, 0)
    a: Cost
    b: Cost
    note: str | None = None


class DifferingAnswer(BaseModel, frozen=True, extra="forbid"):
    """Two answers that differ. `part` is the step, or `step.field`; None is no answer.

    `right_a` and `right_b` are None without a truth. `row` counts from 0 over all files of ROWS.
    """

    row: int
    part: str
    text: str | None
    a: Any
    b: Any
    truth: Any = None
    right_a: bool | None = None
    right_b: bool | None = None


class Comparison(BaseModel, frozen=True, extra="forbid"):
    """Two jobs over the same rows. `kept` is the folder with the answers of both."""

    rows: int
    steps: tuple[StepComparison, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    differences: tuple[DifferingAnswer, ...]
    kept: str
    seconds: float
