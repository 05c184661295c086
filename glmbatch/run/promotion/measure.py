"""Measure changed steps on labelled rows before a run asks anything else.

labelled rows -> the run's own questions, in the run's session -> a score for each row -> beside the
scores of what is published -> passed or refused

The scores are kept, so that a night without a change asks nothing, and neither does a second try.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from glmbatch.errors import AuditError, InputError, counted
from glmbatch.evaluation.bootstrap import groups_of
from glmbatch.evaluation.checkpoint import learned_rows
from glmbatch.evaluation.truth import allowed_truths, check_labels
from glmbatch.ledger.input.cutting import plan_fragments
from glmbatch.ledger.input.fitting import fit_times
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest
from glmbatch.report.counts import NEW, Measured
from glmbatch.run.answer import answer
from glmbatch.run.plan import assign_questions
from glmbatch.run.promotion.changes import what_changed
from glmbatch.run.promotion.kept import (
    TEXT_CHARS,
    Kept,
    asked_with,
    columns_read,
    inputs_of,
    kept_in,
)
from glmbatch.run.promotion.labelled import TRUTH, Labelled, read_labelled
from glmbatch.run.promotion.rule import check_measured, judged, paired
from glmbatch.run.promotion.scores import row_scores
from glmbatch.run.session import session_of
from glmbatch.run.work import Question, Run, Work
from glmbatch.settings.job import DataConfig, EvaluateConfig

logger = logging.getLogger(__name__)


# By step: the prompts that the model was asked, and their tokens.
Costs = dict[str, Counter[str]]


@dataclass(frozen=True, slots=True)
class Standing:
    """One step that has a truth: how it is measured, and what is known of it.

    `change` says how it differs from the published step, None if it does not. `blank` is its
    measurement without scores, `now` the one with them, and `before` that of the published step, if
    there are such. Its checkpoint was trained on the rows `learned_R`.
    """

    question: Question
    asked: Sequence[Question]
    blank: Kept
    change: str | None
    now: Kept | None
    before: Kept | None
    learned_R: np.ndarray


def measure_changes(
    config: EvaluateConfig | None, data: DataConfig, run: Run, questions: Sequence[Question]
) -> tuple[Measured, ...]:
    """How each step with a truth scores, beside what is published; () if there is nothing to prove.

    Asks the model only for steps that were not measured on these rows before. Safe to repeat:
    committed answers are found. InputError when the rows do not match the job.
    """
    if config is None or data.limit is not None:  # a trial replaces nothing
        return ()
    steps = [question.step for question in questions]
    labelled = read_labelled(config, steps, data.text_column, run.needs)
    kept = kept_in(data.output)
    ledger = session_of(run.context).ledger
    found = standings(labelled, questions, ledger)
    due = [standing for standing in found if standing.now is None]
    costs: Costs = {}
    if due:
        asked: set[str] = set()
        for standing in due:
            asked.update(each.name for each in standing.asked)
        chosen = [question for question in questions if question.name in asked]
        work = _work(config.rows, data, run, chosen)
        costs = _ask(work)
        answers = _answers(work, ledger)
        again = read_labelled(config, steps, data.text_column, run.needs)
        if (again.ids, again.columns) != (labelled.ids, labelled.columns):
            raise InputError(f"{config.rows}: was changed while it was read. Run again.")
        for place, standing in enumerate(found):
            if standing.now is None:
                scored = _scored(standing, labelled, answers[standing.question.name])
                kept.keep(scored)
                found[place] = replace(standing, now=scored)
    measured = judgements(config, found, costs)
    for each in measured:
        logger.info("measured on %s: %s", config.rows, each.refused or each)
    return measured


def preview_measures(
    config: EvaluateConfig | None, data: DataConfig, run: Run, questions: Sequence[Question]
) -> tuple[str | None, str | None]:
    """Which steps a run would measure first and why, and why it would publish nothing.

    None where there is nothing to say.
    """
    if config is None or data.limit is not None:
        return None, None
    steps = [question.step for question in questions]
    labelled = read_labelled(config, steps, data.text_column, run.needs)
    found = standings(labelled, questions, Ledger(data.output))
    due = []
    for standing in found:
        if standing.now is None:
            why = standing.change or "not measured before"
            due.append(f"{standing.question.name} ({why})")
    first = (
        f"{counted(len(labelled.table), 'row')} of {config.rows}: {', '.join(due)}" if due else None
    )
    refused = None
    try:
        check_measured(judgements(config, found, {}))
    except AuditError as error:
        refused = str(error)
    return first, refused


def _scored(standing: Standing, labelled: Labelled, answers: pa.Table) -> Kept:
    name = standing.question.name
    score_R = row_scores(standing.question.step, labelled.truths[name], answers)
    scores = tuple(None if np.isnan(score) else float(score) for score in score_R)
    return standing.blank.model_copy(update={"scores": scores})


def standings(labelled: Labelled, questions: Sequence[Question], ledger: Ledger) -> list[Standing]:
    """What is known of each step that has a truth, in step order. Asks nothing."""
    manifest = ledger.manifest()
    published: dict[str, str] = {}
    for file in manifest.files if manifest is not None else ():
        published.update(file.step_keys)
    by_name = {question.name: question for question in questions}
    kept = kept_in(str(ledger.root))
    found = []
    for question in questions:
        if question.name not in labelled.truths:
            continue
        allowed = allowed_truths(question.step, question.labels)
        check_labels(question.step, allowed, labelled.truths[question.name], TRUTH)
        asked = asked_with(question, by_name)
        blank = Kept(
            step=question.name,
            made_with={each.name: each.key for each in asked},
            inputs=inputs_of(asked),
            ids=labelled.ids[question.name],
            values=labelled.digest_of(columns_read(asked)),
            scores=(),
        )
        before = kept.of_published(question.name, published)
        change = _change(question, asked, published, manifest)
        if change is None and before is not None and before.inputs != blank.inputs:
            change = "changed columns or condition"
        now = kept.find(blank.key)
        learned_R = learned_rows(question, labelled.table)
        found.append(Standing(question, asked, blank, change, now, before, learned_R))
    return found


def _change(
    question: Question,
    asked: Sequence[Question],
    published: Mapping[str, str],
    manifest: Manifest | None,
) -> str | None:
    """How a step differs from the published one, for people; None if it does not."""
    if question.name not in published:
        return NEW
    if published[question.name] != question.key:
        return what_changed(question, manifest) or "changed"
    for earlier in asked:
        if published.get(earlier.name) != earlier.key:
            return f"changed step {earlier.name}"
    return None


def judgements(
    config: EvaluateConfig, found: Sequence[Standing], costs: Costs
) -> tuple[Measured, ...]:
    """What the measurements say of the steps that were measured, in step order."""
    measured = []
    for standing in found:
        now = standing.now
        if now is None:
            continue
        is_scored_R = np.array([score is not None for score in now.scores])
        scored = [score for score in now.scores if score is not None]
        facts = {}
        if standing.change is not None and standing.before is not None:
            facts = _beside(standing.before, now)
        own = Measured(
            step=standing.question.name,
            rows=len(scored),
            score=float(np.mean(scored)) if scored else 0.0,
            change=standing.change,
            kept=now.key,
            learned=int((standing.learned_R & is_scored_R).sum()),
            **costs.get(standing.question.name, Counter()),
            **facts,
        )
        measured.append(judged(own, config))
    return tuple(measured)


def _beside(before: Kept, now: Kept) -> dict[str, float]:
    """The scores of the rows that both measurements have."""
    old = dict(zip(before.ids, before.scores, strict=True))
    pairs = []
    for row, score in zip(now.ids, now.scores, strict=True):
        earlier = old.get(row)
        if score is not None and earlier is not None:
            pairs.append((earlier, score, row[:TEXT_CHARS]))
    if not pairs:
        return {}
    group_R = groups_of([begin for _, _, begin in pairs])
    before_R, now_R = np.array([pair[:2] for pair in pairs]).T
    return {"paired": len(pairs), **paired(before_R, now_R, group_R)}


def _work(rows: str, data: DataConfig, run: Run, questions: Sequence[Question]) -> Work:
    """The questions over the labelled rows, as a run asks them."""
    columns = columns_read(questions)
    # Published rows that were corrected have answer columns too, and nothing is written here.
    needs = replace(
        run.needs,
        read=tuple(column for column in run.needs.read if column.name in columns),
        written={},
        tests=tuple(test for test in run.needs.tests if columns.issuperset(test.columns.values())),
    )
    places = {"input": rows, "limit": None, "where": None, "follow_links": False, "version": None}
    labelled = data.model_copy(update=places)
    try:
        plan = plan_fragments(labelled, needs, {}, raise_faults=True)
        plan = fit_times(labelled, plan, None, raise_faults=True)
    except InputError as error:
        raise InputError(f"evaluate.rows: {error}") from error
    # A row that fails scores 0, whatever the job does with such rows of its input.
    context = run.context.model_copy(update={"on_error": "null"})
    own = Run(context=context, plan=plan, inputs={}, needs=needs)
    return assign_questions(own, questions, data.rows_per_fragment)


def _ask(work: Work) -> Costs:
    """Answer and commit every question; what each one asked of the model in this run."""
    run = work.run
    number = len(work.questions)
    session_of(run.context).start("measure", run.plan.rows * number)
    logger.info("measuring %s on %s", counted(number, "step"), counted(run.plan.rows, "row"))
    costs: Costs = {}
    for assignment in work.in_passes():
        for part in answer(assignment):
            if part.unusable is not None:
                raise InputError(f"evaluate.rows: {part.unusable}")
            if part.run == run.context.id:
                own = costs.setdefault(assignment.question.name, Counter())
                tokens = part.prompt_tokens + part.completion_tokens
                own.update(prompts=part.computed_rows, tokens=tokens)
    return costs


def _answers(work: Work, ledger: Ledger) -> dict[str, pa.Table]:
    """The committed answers to each question, in the order of the labelled rows."""
    parts: dict[str, list[pa.Table]] = {question.name: [] for question in work.questions}
    for bundle in work.bundles:
        for assignment in bundle.assignments:
            keys = assignment.answers_keys
            receipt, table = ledger.read_answers(keys.file)
            tables = receipt.split(table)
            parts[assignment.question.name] += [tables[key] for key in keys.fragments]
    return {name: pa.concat_tables(tables) for name, tables in parts.items()}
