"""The numbers of one step: its answers beside the truth, by the kind of answer. Asks no model.

Shapes: R rows.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from glmbatch.errors import InputError, counted
from glmbatch.evaluation.bootstrap import Compared, groups_of
from glmbatch.evaluation.confidence.calibrate import fit_maps
from glmbatch.evaluation.confidence.judged import field_values, judged, label_list
from glmbatch.evaluation.confidence.thresholds import coverages
from glmbatch.evaluation.fields import same_values, score_field, score_values
from glmbatch.evaluation.labels import score_labels, score_several
from glmbatch.evaluation.results import Counts, Result, SeveralResult, StepResult
from glmbatch.evaluation.texts import score_written
from glmbatch.evaluation.truth import FLAG, Truth, check_labels
from glmbatch.report.summary import StepSummary
from glmbatch.settings.columns import ABSTAINED, NOT_ASKED, Columns
from glmbatch.settings.job import AnyStep, ClassifyStep, ExtractStep, GenerateStep
from glmbatch.steps.calibration import confidences

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers to the labelled rows, in their order, and the number of each row's text.

    `steps` says what was asked now for each step, by its name. `step_keys` and `keys` are the step
    keys and the confidence keys of the steps. `learned_R` says of each step which rows its
    checkpoint was trained on.
    """

    answers: pa.Table
    group_R: np.ndarray
    steps: Mapping[str, StepSummary]
    step_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    learned_R: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def spread(self, asked_R: np.ndarray) -> Answered:
        """The answers to more rows, of which only those `asked_R` were asked; null for the others.

        The others have no text of their own, and so cannot be scored.
        """
        place_R = np.cumsum(asked_R) - 1
        answers = self.answers.take(pa.array(place_R, mask=~asked_R))
        learned_R = {name: own_R[place_R] & asked_R for name, own_R in self.learned_R.items()}
        group_R = self.group_R[place_R]
        return dataclasses.replace(self, answers=answers, group_R=group_R, learned_R=learned_R)

    def learned(self, step: str, rows: Sequence[int]) -> int:
        """How many of these rows the checkpoint of `step` was trained on."""
        return int(self.learned_R[step][rows].sum()) if step in self.learned_R else 0


def score_step(
    step: AnyStep,
    truth: Truth | None,
    answered: Answered,
    precisions: Sequence[float],
    *,
    calibrate: bool = False,
) -> StepResult:
    """The numbers of `step` over the rows that have a truth and an answer.

    Also its calibration, if asked to `calibrate` and its answers have a confidence.
    """
    kinds = answered.answers.column(Columns(step.name).error_type).to_pylist()
    known = [False] * len(kinds) if truth is None else truth.known_rows
    scored, counts = _count(kinds, known)
    found = StepResult(
        step=step.name,
        truth={} if truth is None else truth.columns,
        counts=counts,
        results={},
        **_cost(answered.steps[step.name]),
    )
    if truth is None:
        return found.model_copy(update={"note": "no column has its truth"})
    if not scored:
        return found.model_copy(update={"note": "no row has both a truth and an answer"})
    _check_head(step, truth, answered.answers)
    picked = answered.answers.take(pa.array(scored, pa.int64()))
    group_R = groups_of(answered.group_R[scored].tolist())
    expected = truth.of_rows(scored)
    _warn_of_contradictions(step, expected, picked.column(Columns(step.name).key).to_pylist())
    numbers: dict[str, Any]
    if isinstance(step, ExtractStep):
        numbers = _score_fields(step, expected, picked, precisions, group_R)
    else:
        result = _score_answers(step, expected.values[step.name], picked, precisions, group_R)
        numbers = {"results": {step.name: result}}
    if calibrate:
        several = isinstance(numbers["results"].get(step.name), SeveralResult)
        maps, few = fit_maps(judged(step, expected, picked), group_R, several=several)
        numbers |= {"calibration": maps, "uncalibrated": few}
    numbers["learned"] = answered.learned(step.name, scored)
    return found.model_copy(update=numbers)


def _warn_of_contradictions(step: AnyStep, truth: Truth, keys: Sequence[bytes]) -> None:
    """Log how many rows have the prompt of another row and another truth."""
    # One answer cannot be right for both, but a written one has several good ones.
    for name, values in truth.values.items() if not isinstance(step, GenerateStep) else ():
        said: dict[bytes, set[str]] = defaultdict(set)
        for key, value, known in zip(keys, values, truth.known[name], strict=True):
            if known:
                # The order of a list says nothing.
                said[key].add(repr(sorted(value, key=repr) if isinstance(value, list) else value))
        asked = [key for key, known in zip(keys, truth.known[name], strict=True) if known]
        rows = sum(len(said[key]) > 1 for key in asked)
        if rows:
            logger.warning(
                "%s: %s of column %r contradict another row with the same prompt, so some answers "
                "count as wrong whatever they are",
                *(name, counted(rows, "row"), truth.columns[name]),
            )


def _check_head(step: AnyStep, truth: Truth, answers: pa.Table) -> None:
    """InputError if no truth is a label of the trained head that gave the answers."""
    chances = Columns(step.name).scores
    is_head = isinstance(step, ClassifyStep) and step.labels is None
    if is_head and chances in answers.column_names:
        labels = [field.name for field in answers.schema.field(chances).type]
        check_labels(step, {step.name: labels}, truth)


def _count(kinds: Sequence[str | None], known: Sequence[bool]) -> tuple[list[int], Counts]:
    """The rows to score, and where the others are."""
    scored = []
    others = Counter[str]()
    without = 0
    for row, (kind, is_known) in enumerate(zip(kinds, known, strict=True)):
        if not is_known:
            without += 1
        elif kind is None:
            scored.append(row)
        else:
            others[kind] += 1
    counts = Counts(
        rows=len(kinds),
        scored=len(scored),
        without_truth=without,
        not_asked=others.pop(NOT_ASKED, 0),
        abstained=others.pop(ABSTAINED, 0),
        failed=others,
    )
    return scored, counts


def _cost(summary: StepSummary) -> dict[str, int]:
    return {
        "computed": summary.computed,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
    }


def _score_answers(
    step: AnyStep,
    truth: Sequence[Any],
    answers: pa.Table,
    precisions: Sequence[float],
    group_R: np.ndarray,
) -> Result:
    """The numbers of a step that gives one answer, by the type of its answer column."""
    columns = Columns(step.name)
    column = answers.column(columns.answer)
    values = column.to_pylist()
    sure = confidences(step, answers)
    confidence = sure[step.name].tolist() if step.name in sure else None
    if not isinstance(step, ClassifyStep):
        coverage = coverages(precisions, confidence, same_values(truth, values), group_R)
        return score_written(truth, values, group_R).model_copy(update={"coverage": coverage})
    if pa.types.is_floating(column.type):  # a head that estimates a number
        return score_values(_numbers(step, truth), values, group_R)
    chances = answers.column(columns.scores)
    if pa.types.is_list(column.type):
        lists = [label_list(value) for value in truth]
        return score_several(lists, values, chances.to_pylist(), group_R, precisions)
    if any(isinstance(value, list) for value in truth):
        raise InputError(
            f"{FLAG} {step.name}: the column holds lists, and the step gives one label for each "
            "row. Name another column, or set multiple: true."
        )
    labels = [field.name for field in chances.type]
    return score_labels(Compared(truth, values, group_R, confidence), labels, precisions)


def _numbers(step: AnyStep, truth: Sequence[Any]) -> list[float]:
    try:
        return [float(value) for value in truth]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{FLAG} {step.name}: the step answers with numbers, and the column does not: {error}. "
            "Name another column."
        ) from error


def _score_fields(
    step: ExtractStep,
    truth: Truth,
    answers: pa.Table,
    precisions: Sequence[float],
    group_R: np.ndarray,
) -> dict[str, Any]:
    """The numbers of each field over the rows that have it, and how often all of them are right."""
    results: dict[str, Result] = {}
    abstained = {}
    without_truth = {}
    right_R = np.ones(len(answers), bool)
    whole_R = np.ones(len(answers), bool)
    sure = confidences(step, answers)
    for field in step.fields:
        if field.name not in truth.values:
            continue
        values, is_missing = field_values(step, field.name, answers)
        confidence_R = sure.get(field.name)
        known_R = np.array(truth.known[field.name], bool)
        rows = np.flatnonzero(known_R & ~is_missing)
        without_truth[field.name] = int((~known_R).sum())
        abstained[field.name] = int((known_R & is_missing).sum())
        whole_R &= known_R & ~is_missing
        if not len(rows):
            continue
        confidence = None if confidence_R is None else confidence_R.tolist()
        expected = truth.values[field.name]
        compared = Compared(expected, values, group_R, confidence).of_rows(rows)
        results[field.name] = score_field(field, compared, precisions)
        right_R[rows] &= same_values(compared.truth, compared.answers)
    found: dict[str, Any] = {"results": results}
    found["abstained"] = {name: rows for name, rows in abstained.items() if rows}
    found["without_truth"] = {name: rows for name, rows in without_truth.items() if rows}
    if whole_R.any():
        found["exact_match"] = float(right_R[whole_R].mean())
    return found
