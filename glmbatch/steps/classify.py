"""A classify step: labels and their scores. Scores in, columns out; no tensors, no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from glmbatch.errors import InputError
from glmbatch.glm.engine.protocol import ClassifyRequest, ClassifyResult, Engine
from glmbatch.glm.tokenizer import Tokenizer
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import ClassifyStep
from glmbatch.steps.prompt import NoPrompt, NotAsked, Prompt, RowFault, RowPrompts


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen label, and the probability of each label in `scores`; they sum to 1.

    The label is None if the model abstains, because the probability of the best one is too low.
    """

    label: str | None
    scores: Mapping[str, float]

    @property
    def answer(self) -> str | None:
        """The label."""
        return self.label

    @property
    def score(self) -> float:
        """The probability of the best label, which is the chosen one."""
        return max(self.scores.values())

    @property
    def margin(self) -> float:
        """The chosen label's probability minus that of the next one."""
        first, second = sorted(self.scores.values(), reverse=True)[:2]
        return first - second


@dataclass(frozen=True, slots=True)
class Selection:
    """The labels that apply to a row, in the order of the step; each was judged by itself.

    `scores` has the probability of each label of the step, and `thresholds` those from which on a
    label applies.
    """

    labels: tuple[str, ...]
    scores: Mapping[str, float]
    thresholds: Mapping[str, float]

    @property
    def answer(self) -> list[str]:
        """The labels as a list."""
        return list(self.labels)

    @property
    def score(self) -> float:
        """The probability of the least certain verdict: that its label applies, or does not."""
        sure = []
        for label, score in self.scores.items():
            sure.append(score if label in self.labels else 1 - score)
        return min(sure)

    @property
    def margin(self) -> float:
        """The least distance of a label's probability from its threshold."""
        return min(abs(score - self.thresholds[label]) for label, score in self.scores.items())


@dataclass(frozen=True, slots=True)
class Number:
    """The number that a head predicts for a row."""

    answer: float


def choice_fields(step: ClassifyStep, labels: Sequence[str]) -> list[pa.Field]:
    """The fields of a choice: answer, score, all scores, margin; of a number, the answer alone.

    `labels` are the score fields.
    """
    columns = Columns(step.name)
    if step.number:
        return [pa.field(columns.answer, pa.float64())]
    scores = pa.struct([pa.field(label, pa.float64()) for label in labels])
    return [
        pa.field(columns.answer, pa.list_(pa.string()) if step.multiple else pa.string()),
        pa.field(columns.score, pa.float64()),
        pa.field(columns.scores, scores),
        pa.field(columns.margin, pa.float64()),
    ]


def choice_columns(
    step: ClassifyStep, choices: Sequence[Choice | Selection | Number | None]
) -> list[list[object]]:
    """The values of each field of `choice_fields`, row by row; None where there is no choice."""
    if step.number:
        return [[None if choice is None else choice.answer for choice in choices]]
    columns: list[list[object]] = [[], [], [], []]
    for choice in choices:
        values: tuple[object, ...] = (None, None, None, None)
        if isinstance(choice, Choice | Selection):
            values = (choice.answer, choice.score, choice.scores, choice.margin)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return columns


# What a prompt says in place of a row's values when labels are asked for without any row.
CONTENT_FREE = "N/A"
Prior = Sequence[float]  # the log-likelihood of each label behind that prompt


@dataclass(frozen=True, slots=True)
class LabelSet:
    """The labels of a step, and the token ids of what the engine scores.

    These are the labels; with `thresholds`, two verdicts on each label, one after the other. No
    `ids` are those of a trained head. The best label is chosen if its probability reaches the one
    in `least`. With a `prior`, labels are compared with what it has; a fault is why there is none.
    With `number`, the head gives a number instead.
    """

    labels: Sequence[str]
    ids: tuple[tuple[int, ...], ...] | None
    least: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] | None = None
    by_mean: bool = False
    prior: Prior | RowFault | None = None
    number: bool = False

    def choose(self, result: ClassifyResult) -> Choice | Selection | Number | RowFault:
        """The choice that a result makes, or the reason why the model failed."""
        if result.error is not None:
            return RowFault("model_failed", result.error)
        if isinstance(self.prior, RowFault):
            return self.prior
        if self.number:
            # A head computes in float32: the digits of its number, without those of a float64.
            return Number(float(str(np.float32(result.scores[0]))))
        if self.thresholds is not None:
            odds = result.scores if self.ids is None else verdict_odds(result.scores)
            return select(self.labels, odds, self.thresholds)
        if self.ids is None:
            choice = choose(self.labels, result.scores)
        else:
            choice = choose_by_likelihood(
                self.labels, self.ids, result.scores, by_mean=self.by_mean, prior=self.prior
            )
        assert choice.label is not None
        if choice.score < self.least.get(choice.label, 0.0):
            return replace(choice, label=None)
        return choice


def label_set(
    step: ClassifyStep, head_labels: Sequence[str], tokenizer: Tokenizer | None
) -> LabelSet:
    """The labels that the engine scores for `step`.

    A checkpoint with `head_labels` answers with its trained head; any other needs `tokenizer`, for
    the likelihood of the step's labels or verdicts. InputError when two have the same or no tokens.
    """
    labels = head_labels or step.labels or ()
    thresholds = None
    if step.multiple:
        thresholds = {label: step.threshold_of(label) for label in step.labels or head_labels}
    least = {label: step.least_of(label) for label in labels}
    if head_labels:
        return LabelSet(labels, None, least, thresholds, number=step.number)
    assert tokenizer is not None
    ids = encode_labels(scored_texts(step), tokenizer)
    return LabelSet(labels, ids, least, thresholds, step.compare == "mean")


def scored_texts(step: ClassifyStep) -> list[str]:
    """The answers whose likelihoods decide: the labels, or two verdicts on each of them."""
    labels = step.labels or []
    if not step.multiple:
        return labels
    texts = []
    for label in labels:
        # Label first, so that all verdicts are branches behind one reading of the prompt.
        texts += [f"{label}: {verdict}" for verdict in step.verdicts or ("yes", "no")]
    return texts


def ask_choices(
    label_sets: Sequence[LabelSet], rows: Iterable[RowPrompts], engine: Engine
) -> Iterator[tuple[int, bytes, Choice | Selection | Number | RowFault]]:
    """Ask the engine about each row; yield the choices in any order.

    Each comes with the number of its label set and its row key. A prompt on which the model failed
    has a RowFault.
    """
    asked: list[tuple[int, bytes]] = []  # the engine numbers its requests

    def request(number: int, key: bytes, prompt: Prompt) -> ClassifyRequest:
        asked.append((number, key))
        ids = label_sets[number].ids
        return ClassifyRequest(len(asked) - 1, prompt.ids, ids, prompt.shared_tokens)

    def requests() -> Iterator[ClassifyRequest]:
        for row in rows:
            first, *others = (request(*question) for question in row)
            yield replace(first, beside=tuple(others))

    for result in engine.classify(requests()):
        number, key = asked[result.index]
        yield number, key, label_sets[number].choose(result)


def ask_prior(labels: LabelSet, prompt: Prompt | NoPrompt, engine: Engine) -> Prior | RowFault:
    """The log-likelihoods of `labels` behind the content-free `prompt`, or why there are none.

    InputError if there is no such prompt, which is no row's fault.
    """
    assert not isinstance(prompt, NotAsked)
    if isinstance(prompt, RowFault):
        raise InputError(
            "compare: prior asks the prompt without a row's values too, and cannot: "
            f"{prompt.reason}. Set compare."
        )
    request = ClassifyRequest(0, prompt.ids, labels.ids, prompt.shared_tokens)
    (result,) = engine.classify([request])
    if result.error is not None:
        return RowFault("model_failed", f"without the row's values, {result.error}")
    return result.scores


def encode_labels(labels: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each label, in order, encoded as the answers in the model's training are.

    InputError when a label has no ids, or two labels have the same ids.
    """
    encoded = tuple(tuple(ids) for ids in tokenizer.encode_plain(list(labels)))
    by_ids: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, encoded, strict=True):
        if not ids:
            raise InputError(f"label {label!r} has no token in this tokenizer. Set labels.")
        first = by_ids.setdefault(ids, label)
        if first != label:
            raise InputError(
                f"labels {first!r} and {label!r} are the same tokens {list(ids)}. Set labels."
            )
    return encoded


def choose_by_likelihood(
    labels: Sequence[str],
    label_ids: Sequence[tuple[int, ...]],
    log_likelihoods: Sequence[float],
    *,
    by_mean: bool = False,
    prior: Prior | None = None,
) -> Choice:
    """The choice among whole labels, from the log-likelihood of each label's tokens.

    If one label begins another ("good", "good enough"), the shorter one is always likelier, because
    every answer with the longer one begins with it. Its score is therefore the likelihood that the
    answer begins with it but not with a longer label. So labels exclude each other, and a longer
    one can win. With `by_mean`, that of a label is divided by the number of its tokens. The same
    likelihoods behind a prompt without a row, the `prior`, are divided out.
    """
    exclusive = _exclusive(label_ids, log_likelihoods)
    if by_mean:
        exclusive = [one / len(ids) for one, ids in zip(exclusive, label_ids, strict=True)]
    if prior is not None:
        before = _exclusive(label_ids, prior)
        for index, likelihood in enumerate(before):
            # Zero by rounding: then the label is compared with all answers that begin with it.
            exclusive[index] -= prior[index] if likelihood == -math.inf else likelihood
    return choose(labels, exclusive)


def _exclusive(
    label_ids: Sequence[tuple[int, ...]], log_likelihoods: Sequence[float]
) -> list[float]:
    """The log-likelihood of each label without that of the labels that continue it."""
    exclusive = []
    for index in range(len(label_ids)):
        longer = [log_likelihoods[other] for other in _next_longer(label_ids, index)]
        exclusive.append(_log_subtract(log_likelihoods[index], longer))
    return exclusive


def _next_longer(label_ids: Sequence[tuple[int, ...]], index: int) -> list[int]:
    """The labels that continue label `index`, without those that continue another of these."""
    longer = [other for other in range(len(label_ids)) if _begins(label_ids, index, other)]
    nearest = []
    for other in longer:
        # "good enough" continues "good", and "good enough indeed" continues both. Only the first
        # counts, because its likelihood includes that of the second.
        if not any(_begins(label_ids, between, other) for between in longer):
            nearest.append(other)
    return nearest


def _begins(label_ids: Sequence[tuple[int, ...]], index: int, other: int) -> bool:
    """Whether label `other` begins with label `index` and is longer."""
    start = label_ids[index]
    return len(label_ids[other]) > len(start) and label_ids[other][: len(start)] == start


def _log_subtract(whole: float, parts: Sequence[float]) -> float:
    """log(exp(whole) - sum(exp(parts))); the parts are shares of the whole, but for rounding."""
    share = math.fsum(math.exp(part - whole) for part in parts)
    return whole + math.log1p(-share) if share < 1 else -math.inf


def choose(labels: Sequence[str], log_weights: Sequence[float]) -> Choice:
    """The likeliest label and the softmax of `log_weights`, independent of the order of labels.

    `log_weights` are logits or log-likelihoods, one for each label.
    """
    top = max(log_weights)  # subtracted so that no exponential overflows
    weights = [math.exp(weight - top) for weight in log_weights]
    total = math.fsum(weights)  # exact, so the order of labels cannot change the last bit
    scores = {label: weight / total for label, weight in zip(labels, weights, strict=True)}
    # A tie goes to the label that is first in alphabetical order.
    return Choice(min(labels, key=lambda label: (-scores[label], label)), scores)


def verdict_odds(log_likelihoods: Sequence[float]) -> list[float]:
    """The log-odds of each label, from the log-likelihoods of both verdicts on each of them."""
    pairs = zip(log_likelihoods[::2], log_likelihoods[1::2], strict=True)
    return [applies - not_so for applies, not_so in pairs]


def select(
    labels: Sequence[str], log_odds: Sequence[float], thresholds: Mapping[str, float]
) -> Selection:
    """The labels that apply, in the order of `thresholds`, from the log-odds of each of them."""
    scores = {label: _sigmoid(odds) for label, odds in zip(labels, log_odds, strict=True)}
    chosen = tuple(label for label in thresholds if scores[label] >= thresholds[label])
    return Selection(chosen, scores, thresholds)


def _sigmoid(value: float) -> float:
    small = math.exp(-abs(value))  # at most 1
    return 1 / (1 + small) if value >= 0 else small / (1 + small)
