"""Two jobs over the same rows: where their answers differ, and which are right.

rows -> both jobs, as an evaluation asks them -> each step that both have, row by row

A truth is compared where the rows have one. Publishes nothing. Shapes: R rows.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glmbatch.errors import InputError, some_of
from glmbatch.evaluation.answers import Answers, answers_of, expected_of, right_rows
from glmbatch.evaluation.bootstrap import groups_of
from glmbatch.evaluation.differences import moved, pair, without_nulls
from glmbatch.evaluation.evaluate import (
    ask_about,
    columns_of,
    measured_settings,
    narrowed,
    own_folder,
)
from glmbatch.evaluation.fields import same_values
from glmbatch.evaluation.results import (
    Comparison,
    Cost,
    DifferingAnswer,
    Part,
    StepComparison,
)
from glmbatch.evaluation.steps import Answered
from glmbatch.evaluation.truth import (
    Truth,
    allowed_truths,
    check_labels,
    check_names,
    read_labelled_rows,
    truth_of,
)
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report.counts import busy_seconds
from glmbatch.run.table import Job, first_asked
from glmbatch.settings.job import AnyStep


def compare(
    a: Job,
    b: Job,
    rows: str,
    *,
    truth: Mapping[str, str] | None = None,
    keep: str | os.PathLike[str] | None = None,
) -> Comparison:
    """The answers of two jobs to `rows`: a Parquet file, folder or glob, with labels or without.

    Steps are compared by their names. `truth` and `keep` are as for `evaluate`. InputError if the
    jobs have no step in common, and as for `annotate_table`.
    """
    began = time.monotonic()
    jobs = measured_settings(a), measured_settings(b)
    steps = {step.name: step for step in jobs[0].steps}
    others = {step.name: step for step in jobs[1].steps}
    names = _shared([*steps], [*others])
    given = truth or {}
    check_names([*steps.values(), *others.values()], given)
    wanted, places = columns_of(jobs[0], given)
    table, every = read_labelled_rows(rows, wanted | columns_of(jobs[1], given)[0])
    folder = keep or own_folder(jobs[0].runtime.cache)
    # Of a step that only one job has, nothing is shown.
    shared = [narrowed(job, names, rows, every) for job in jobs]
    asked = [ask_about(table, job, rows, folder) for job in shared]
    text = jobs[0].data.text_column
    texts = table.column(text).to_pylist() if text in table.column_names else None
    compared = []
    differences: list[DifferingAnswer] = []
    for name in names:
        expected = truth_of(steps[name], table, places[name], given)
        check_labels(steps[name], _allowed(steps[name], others[name]), expected)
        found, differing = compare_step((steps[name], others[name]), expected, asked, texts, folder)
        compared.append(found)
        differences += differing
    return Comparison(
        rows=len(table),
        steps=tuple(compared),
        only_in_a=tuple(name for name in steps if name not in others),
        only_in_b=tuple(name for name in others if name not in steps),
        differences=tuple(differences),
        kept=str(folder),
        seconds=time.monotonic() - began,
    )


def _shared(steps: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names that both jobs have. InputError if there are none."""
    names = [name for name in steps if name in others]
    if not names:
        raise InputError(
            f"The jobs have no step of the same name: A has {some_of(steps)}, and B has "
            f"{some_of(others)}. Rename one."
        )
    return names


def _allowed(step: AnyStep, other: AnyStep) -> dict[str, list[str]]:
    """What the truths of both steps may be: what is allowed in one of them."""
    ours, theirs = allowed_truths(step), allowed_truths(other)
    return {name: [*dict.fromkeys([*ours[name], *theirs[name]])] for name in ours if name in theirs}


def compare_step(
    steps: tuple[AnyStep, AnyStep],
    truth: Truth | None,
    answered: Sequence[Answered],
    texts: Sequence[Any] | None,
    folder: str | os.PathLike[str],
) -> tuple[StepComparison, list[DifferingAnswer]]:
    """A step of both jobs, and its answers that differ, in row order.

    The answers are kept in `folder`.
    """
    a, b = (answers_of(step, of.answers) for step, of in zip(steps, answered, strict=True))
    parts = {}
    differences: list[DifferingAnswer] = []
    left_out = sorted(a.keys() ^ b.keys())
    for name in a:
        if name not in b or a[name].kind != b[name].kind:
            left_out += [name] if name in b else []
            continue
        expected = expected_of(a[name].kind, name, truth)
        parts[name] = _part(a[name], b[name], expected, answered[0].group_R)
        part = name if name == steps[0].name else f"{steps[0].name}.{name}"
        differences += _differing(part, a[name], b[name], expected, texts)
    note = f"not compared, because only one job has such answers: {some_of(left_out)}"
    found = StepComparison(
        step=steps[0].name,
        truth={} if truth is None else truth.columns,
        parts=parts,
        learned=(_learned(steps[0], truth, answered[0]), _learned(steps[1], truth, answered[1])),
        a=_cost(steps[0].name, answered[0], folder),
        b=_cost(steps[0].name, answered[1], folder),
        note=note if left_out else None,
    )
    return found, differences


def _learned(step: AnyStep, truth: Truth | None, answered: Answered) -> int:
    """How many rows with a truth the checkpoint of `step` was trained on."""
    if truth is None:
        return 0
    return answered.learned(step.name, np.flatnonzero(truth.known_rows).tolist())


def _part(a: Answers, b: Answers, expected: Answers | None, group_R: np.ndarray) -> Part:
    both_R = a.answered_R & b.answered_R
    found = Part(
        moved=moved(a.kind, _picked(a, both_R), _picked(b, both_R)),
        only_a=int((a.answered_R & ~b.answered_R).sum()),
        only_b=int((b.answered_R & ~a.answered_R).sum()),
    )
    if expected is None:
        return found
    both_R &= expected.answered_R
    if not both_R.any():
        return found
    truth = _picked(expected, both_R)
    groups = groups_of(group_R[both_R].tolist())
    paired = pair(a.kind, truth, _picked(a, both_R), _picked(b, both_R), groups)
    return found.model_copy(update={"paired": paired})


def _picked(answers: Answers, picked_R: np.ndarray) -> list[Any]:
    return [answers.values[row] for row in np.flatnonzero(picked_R).tolist()]


def _differing(
    part: str, a: Answers, b: Answers, expected: Answers | None, texts: Sequence[Any] | None
) -> Iterator[DifferingAnswer]:
    """The rows that one job alone answered, or both in another way."""
    same_R = same_values(without_nulls(a.kind, a.values), without_nulls(b.kind, b.values))
    same_R = np.where(a.answered_R & b.answered_R, same_R, a.answered_R == b.answered_R)
    rights = [] if expected is None else [right_rows(a, expected), right_rows(b, expected)]
    for row in np.flatnonzero(~same_R).tolist():
        text = None if texts is None else texts[row]
        known: dict[str, Any] = {}
        if expected is not None and expected.answered_R[row]:
            is_right_a, is_right_b = (bool(right_R[row]) for right_R in rights)
            known = {"truth": expected.values[row], "right_a": is_right_a, "right_b": is_right_b}
        yield DifferingAnswer(
            row=row,
            part=part,
            text=None if text is None else str(text),
            a=a.values[row] if a.answered_R[row] else None,
            b=b.values[row] if b.answered_R[row] else None,
            **known,
        )


def _cost(step: str, answered: Answered, folder: str | os.PathLike[str]) -> Cost:
    receipts = first_asked(answered.answers, step, answered.step_keys[step], folder)
    by_run: dict[str, list[AnswersReceipt]] = defaultdict(list)
    for receipt in receipts:
        by_run[receipt.run].append(receipt)
    now = answered.steps[step]
    return Cost(
        prompts=sum(receipt.computed_rows for receipt in receipts),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in receipts),
        completion_tokens=sum(receipt.completion_tokens for receipt in receipts),
        seconds=sum(map(busy_seconds, by_run.values())),
        now=now.computed,
        tokens_now=now.prompt_tokens + now.completion_tokens,
    )
