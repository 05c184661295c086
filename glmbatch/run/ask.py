"""Ask the model: prompts in, answers out, through the engine of the run's session.

    Choice, Selection, Number, Writing, Extraction
                       a model's answer to one prompt (classify, generate and extract in steps/)
    Outcome            one of these, or a RowFault if the model failed
    Asked              the outcomes of many prompts, by row key
    Answer             an outcome as a row of a table (steps/answers.py)
    Asking             the prompts of one question, before it is known which of them to ask

Knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count

import pyarrow as pa

from glmbatch.errors import TransientError
from glmbatch.glm.engine.protocol import Engine
from glmbatch.ledger.known.answers import Hold
from glmbatch.run.models import tokenizer_of
from glmbatch.run.prompts import build_question_prompts, triage
from glmbatch.run.session import Session
from glmbatch.run.work import Question, now
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import ClassifyStep, ExtractStep, GenerateStep, placeholders
from glmbatch.steps.answers import Answer, answers_table
from glmbatch.steps.classify import (
    CONTENT_FREE,
    Choice,
    LabelSet,
    Number,
    Selection,
    ask_choices,
    ask_prior,
    label_set,
)
from glmbatch.steps.extract import Extraction, ask_extractions
from glmbatch.steps.generate import Writing, ask_writings
from glmbatch.steps.prompt import NoPrompt, Prompt, RowFault, RowPrompts, one_by_one

Outcome = Choice | Selection | Number | Writing | Extraction | RowFault


@dataclass(frozen=True, slots=True)
class Asked:
    """The model's outcomes by row key.

    `began` is in seconds since 1970, after loading. Questions that were asked together divide the
    time among them.
    """

    began: float
    seconds: float
    outcomes: dict[bytes, Outcome]

    @property
    def only_reason(self) -> str | None:
        """The reason for which the model failed on every prompt, with N for each number.

        None if any prompt was answered or the reasons differ.
        """
        reasons: set[str] = set()
        for outcome in self.outcomes.values():
            if not isinstance(outcome, RowFault):
                return None
            # Numbers such as a prompt's length differ from row to row.
            reasons.add(re.sub(r"(?<![\w:])\d+", "N", outcome.reason))
        return reasons.pop() if len(reasons) == 1 else None


@dataclass(frozen=True, slots=True)
class Asking:
    """One question: the row key of each row in order, if it has one, and the distinct prompts."""

    question: Question
    keys: Sequence[bytes | None]
    prompts: Mapping[bytes, Prompt]


def find_or_ask(
    askings: Sequence[Asking], holds: Sequence[Hold], session: Session
) -> list[tuple[pa.Table, Asked]]:
    """For each question, the answers to its prompts in any order, and what the model was asked.

    All are about the same rows and of one model. Uses known answers. Asks the model about the keys
    that this caller holds, and about another's keys only if that caller failed to commit them.
    """
    known: list[pa.Table] = []
    mine: list[dict[bytes, Prompt]] = []
    others: list[dict[bytes, Prompt]] = []
    for asking, hold in zip(askings, holds, strict=True):
        found = triage(asking.question, asking.prompts, session.known_answers(asking.question))
        known.append(found.known)
        mine.append({key: found.to_ask[key] for key in found.to_ask if key in hold.mine})
        others.append({key: found.to_ask[key] for key in found.to_ask if key not in hold.mine})
    questions = [asking.question for asking in askings]
    all_asked = ask(questions, _rows([asking.keys for asking in askings], mine), session)
    results = []
    for number, asked in enumerate(all_asked):
        question, outcomes, parts = questions[number], asked.outcomes, [known[number]]
        if others[number]:
            # Bundles in flight may share texts; only one of them asks about each.
            holds[number].wait_for_others()
            second_look = triage(question, others[number], session.known_answers(question))
            parts.append(second_look.known)
            # Those left are of a holder that failed.
            (after,) = ask([question], one_by_one(second_look.to_ask), session)
            outcomes.update(after.outcomes)
        answers = [Answer(outcome, key) for key, outcome in outcomes.items()]
        parts.append(answers_table(question.step, question.model.labels, answers))
        session.progress.add(len(askings[number].prompts) - len(answers), computed=False)
        results.append((pa.concat_tables(parts), asked))
    return results


def _rows(
    keys: Sequence[Sequence[bytes | None]], to_ask: Sequence[Mapping[bytes, Prompt]]
) -> Iterator[RowPrompts]:
    """The prompts of each row that are `to_ask`, each of them in the first row that has it."""
    left = [dict(prompts) for prompts in to_ask]
    for row_keys in zip(*keys, strict=True):
        row = []
        for number, key in enumerate(row_keys):
            if key is not None and key in left[number]:
                row.append((number, key, left[number].pop(key)))
        if row:
            yield row


def in_row_order(
    question: Question,
    answers: pa.Table,
    prompts: Sequence[Prompt | NoPrompt],
    keys: Sequence[bytes | None],
) -> pa.Table:
    """A table with the answer of each row, or why it has no prompt, in order."""
    others = [Answer(prompt) for prompt in prompts if isinstance(prompt, NoPrompt)]
    table = pa.concat_tables([answers, answers_table(question.step, question.model.labels, others)])
    answer_keys = answers.column(Columns(question.name).key).to_pylist()
    place_of = {key: place for place, key in enumerate(answer_keys)}
    # Rows without a prompt follow the answers, in their order.
    other_places = count(len(answers))
    places = []
    for key in keys:
        places.append(next(other_places) if key is None else place_of[key])
    return table.take(pa.array(places, pa.int64()))


def ask(
    questions: Sequence[Question],
    rows: Iterable[RowPrompts],
    session: Session,
    *,
    counted: bool = True,
) -> list[Asked]:
    """Ask the model about all `rows`; for each of the questions, the outcomes by row key.

    Several questions are of one kind, labels or texts, and have one model. No engine is loaded if
    there is no row. `counted` outcomes advance the run's progress. A prompt on which the model
    failed has a RowFault as its outcome. TransientError when the machine failed, Interrupted when
    the run was stopped.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return [Asked(now(), 0.0, {}) for _ in questions]
    outcomes: list[dict[bytes, Outcome]] = [{} for _ in questions]
    with session.engine(questions[0]) as engine:
        began = now()  # after loading, which must not count against the model's speed
        try:
            for number, key, outcome in _outcomes(questions, chain([first], rows), engine, session):
                outcomes[number][key] = outcome
                session.progress.add(1 if counted else 0, computed=True)
                session.check_running()  # stopping the run does not close a shared engine
        except TransientError:
            session.check_running()  # perhaps it failed because the run was stopped
            session.discard(engine)
            raise
    return _divided(began, now() - began, outcomes)


def _divided(began: float, seconds: float, outcomes: list[dict[bytes, Outcome]]) -> list[Asked]:
    """The outcomes of each question, with its share of the time."""
    each = seconds / max(1, sum(map(len, outcomes)))
    asked = []
    for of_question in outcomes:
        asked.append(Asked(began, each * len(of_question), of_question))
        began += each * len(of_question)
    return asked


def _outcomes(
    questions: Sequence[Question], rows: Iterable[RowPrompts], engine: Engine, session: Session
) -> Iterator[tuple[int, bytes, Outcome]]:
    step = questions[0].step
    if isinstance(step, ClassifyStep):
        label_sets = [_label_set(question, engine, session) for question in questions]
        return ask_choices(label_sets, rows, engine)
    tokenizer = tokenizer_of(questions[0].model)
    if isinstance(step, ExtractStep):
        prompts = {key: prompt for ((_, key, prompt),) in rows}
        answers = ask_extractions(step, prompts, engine, tokenizer)
        return ((0, *answer) for answer in answers)
    written = []
    for question in questions:
        assert isinstance(question.step, GenerateStep)
        written.append((question.step, question.chat))
    return ask_writings(written, rows, engine, tokenizer)


def _label_set(question: Question, engine: Engine, session: Session) -> LabelSet:
    """The labels of a classify step, with their prior if they are compared with it."""
    assert isinstance(question.step, ClassifyStep)
    model = question.model
    # A head has labels of its own, which are not encoded.
    tokenizer = None if model.has_head else tokenizer_of(model)
    labels = label_set(question.step, model.labels, tokenizer)
    if question.step.compare != "prior":
        return labels
    row = dict.fromkeys(placeholders(question.step.prompt_template), CONTENT_FREE)
    (prompt,) = build_question_prompts(question, [row])
    return replace(labels, prior=session.prior(question, lambda: ask_prior(labels, prompt, engine)))
