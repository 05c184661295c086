"""How right each answer to a labelled row is, from 0 to 1. Asks no model, reads no files.

Shapes: P parts, R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from glmbatch.errors import InputError
from glmbatch.evaluation.answers import Answers, answers_of, expected_of
from glmbatch.evaluation.differences import without_nulls
from glmbatch.evaluation.fields import same_values
from glmbatch.evaluation.truth import Truth
from glmbatch.settings.columns import NOT_ASKED, Columns
from glmbatch.settings.job import AnyStep, ClassifyStep
from glmbatch.tuning.scores import rouge_l_of_texts


def row_scores(step: AnyStep, truth: Truth, answers: pa.Table) -> np.ndarray:
    """The score of each row; not a number without a truth, or where the step is not asked.

    A label, a value or a choice is right or wrong. Several labels and lists score the F1 of their
    items, texts ROUGE-L over characters, and fields their mean. A number that a head estimates
    scores 1 less its distance from the truth, as a share of the range of truths. A row without an
    answer scores 0, because a change that leaves rows without one is no gain.
    """
    parts = []
    for name, given in answers_of(step, answers).items():
        expected = expected_of(given.kind, name, truth)
        if expected is not None:
            parts.append(_scores(step, given, expected))
    kinds = answers.column(Columns(step.name).error_type).to_pylist()
    asked_R = np.array([kind != NOT_ASKED for kind in kinds], bool)
    # A field without a truth in a row does not count there.
    return np.where(asked_R, _mean(parts), np.nan)


def _scores(step: AnyStep, given: Answers, expected: Answers) -> np.ndarray:
    score_R = np.where(expected.answered_R, 0.0, np.nan)
    rows = np.flatnonzero(given.answered_R & expected.answered_R).tolist()
    truth = without_nulls(given.kind, [expected.values[row] for row in rows])
    values = without_nulls(given.kind, [given.values[row] for row in rows])
    if given.kind == "text":
        texts = [str(value).strip() for value in truth]
        score_R[rows] = rouge_l_of_texts(texts, [str(value).strip() for value in values])
    elif given.kind in ("several labels", "list"):
        score_R[rows] = [_f1(one, other) for one, other in zip(truth, values, strict=True)]
    elif given.kind == "value" and isinstance(step, ClassifyStep):
        # Of all rows with a truth, so that a row scores the same whichever others have an answer.
        number_R = np.full(len(score_R), np.nan)
        known_R = expected.answered_R
        number_R[known_R] = _numbers(step, [x for x in expected.values if x is not None])
        extent = np.ptp(number_R[known_R]) or 1.0
        score_R[rows] = np.clip(1 - np.abs(number_R[rows] - values) / extent, 0, 1)
    else:
        score_R[rows] = same_values(truth, values)
    return score_R


def _mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of each row over the parts that count there; not a number without one."""
    part_PR = np.stack(parts)
    counts_R = (~np.isnan(part_PR)).sum(axis=0)
    mean_R: np.ndarray = np.where(counts_R, np.nansum(part_PR, axis=0), np.nan)
    mean_R /= np.maximum(counts_R, 1)
    return mean_R


def _f1(truth: Sequence[Any] | None, answer: Sequence[Any] | None) -> float:
    one, other = Counter(truth or ()), Counter(answer or ())
    both = one.total() + other.total()
    return 2 * (one & other).total() / both if both else 1.0


def _numbers(step: AnyStep, truth: Sequence[Any]) -> np.ndarray:
    try:
        return np.array([float(value) for value in truth])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"evaluate.truth: step {step.name!r} answers with numbers, and its truth has others: "
            f"{error}. Name another column."
        ) from error
