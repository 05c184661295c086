"""Answer one question over one bundle: rows, prompts, known or asked answers, commit.

The public calls take and return small references; rows, tables and models stay inside. Each call is
safe to repeat: committed answers are found and reused.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from glmbatch.errors import BadRow, InputError, UnusableFile
from glmbatch.ledger.fragments import Fragment
from glmbatch.ledger.known.answers import KnownAnswers
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import LENGTH_BIN, AnswersReceipt, BundleReceipt
from glmbatch.run.ask import Asked, Asking, Outcome, find_or_ask, in_row_order
from glmbatch.run.models import describe_model
from glmbatch.run.prompts import (
    build_question_prompts,
    key_prompts,
    read_prompt_rows,
)
from glmbatch.run.session import Session, session_of
from glmbatch.run.work import Assignment, Question
from glmbatch.settings.columns import Columns
from glmbatch.steps.answers import AnswerCounter
from glmbatch.steps.prompt import NoPrompt, Prompt, RowFault, RowValues
from glmbatch.store.folder import Folder

# A run stops when the model has failed on this many whole fragments and distinct rows without one
# answer. Both limits must be reached, so one odd file of rows too long for memory stops no job.
HOPELESS_FRAGMENTS = 2
HOPELESS_ROWS = 20


@dataclass(frozen=True, slots=True)
class Part:
    """A fragment of a bundle: its answers key, and the placeholder values of its rows.

    `earlier` maps each step whose answers the prompts use to the run that made these. It is kept in
    the receipt: if the earlier step is asked again, the answers are out of date.
    """

    fragment: Fragment
    key: str
    rows: list[RowValues | NoPrompt]
    earlier: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Reading:
    """The rows that one assignment asks about, in order: their prompts and row keys.

    `distinct` has each prompt once. `unusable` has the receipts of fragments that cannot be read.
    """

    assignment: Assignment
    parts: Sequence[Part]
    unusable: Sequence[AnswersReceipt]
    prompts: Sequence[Prompt | NoPrompt]
    keys: Sequence[bytes | None]
    distinct: dict[bytes, Prompt]

    @property
    def rows(self) -> list[str]:
        """The names of the fragments whose rows these are."""
        return [part.fragment.name for part in self.parts]


def answer(assignment: Assignment) -> list[AnswersReceipt]:
    """Answer one question for every row of a bundle, and commit the answers.

    Returns a receipt for each fragment. Safe to repeat: if the answers are committed already,
    returns their receipts. Questions `beside` it are answered and committed too, so that a text is
    read once; their own calls return what was committed. A fragment that cannot be read gives a
    receipt with the reason in `unusable`. Under `on_error: raise` such a fragment, or a bad row,
    raises InputError. TransientError when the machine failed.
    """
    session = session_of(assignment.run)
    receipts = session.answered_beside.pop(assignment.answers_keys.file, None)
    if receipts is None:
        committed = find_answers(assignment, session.ledger)
        if committed is not None:
            # From this run if the task is a retry, else from an earlier run over the same rows.
            receipts = list(committed.parts)
            session.progress.add(assignment.rows, computed=False)
        else:
            receipts = _answer_with_others(assignment, session)
    session.log.add(receipts)
    by_key = {receipt.key: receipt for receipt in receipts}
    return [by_key[key] for key in assignment.answers_keys.fragments]


def _answer_with_others(assignment: Assignment, session: Session) -> list[AnswersReceipt]:
    """The receipts of `assignment`; those of the assignments beside it stay in the session."""
    asked = [assignment]
    for other in assignment.beside:
        if find_answers(other, session.ledger) is None:
            asked.append(other)
    readings = [_read(each, session) for each in asked]
    # Another may have no answer of an earlier step to some fragment: it is asked later.
    together = [reading for reading in readings if reading.rows == readings[0].rows]
    for reading, receipts in zip(together, _answer_parts(together, session), strict=True):
        unread = reading.assignment.rows - len(reading.prompts)
        session.progress.add(unread, computed=False)
        key = reading.assignment.answers_keys.file
        session.answered_beside[key] = [*receipts, *reading.unusable]
    return session.answered_beside.pop(assignment.answers_keys.file)


def find_answers(assignment: Assignment, ledger: Ledger) -> BundleReceipt | None:
    """The receipt of the committed answers, if they are whole and need not be asked again."""
    keys = assignment.answers_keys
    earlier = {name: before.file for name, before in assignment.earlier.items()}
    by_failures = assignment.question.inputs.by_failures
    return ledger.find_answers(
        keys.file, assignment.run.id, earlier, keys.fragments, by_failures=by_failures
    )


def read_parts(assignment: Assignment, session: Session) -> tuple[list[Part], list[AnswersReceipt]]:
    """The fragments with their rows, and the receipts of those that cannot be read.

    Fragments with the same rows have the same answers key, and give one part.
    """
    read: dict[str, tuple[str, dict[str, pa.Table]]] = {}

    def earlier(number: int, name: str) -> pa.Table | None:
        keys = assignment.earlier[name]
        # Only now: if no fragment could be read, there is no such file.
        if name not in read:
            receipt, table = session.ledger.read_answers(keys.file)
            read[name] = receipt.run, receipt.split(table)
        return read[name][1].get(keys.fragments[number])

    parts: dict[str, Part] = {}
    unusable: dict[str, AnswersReceipt] = {}
    for number, fragment in enumerate(assignment.fragments):
        key = assignment.answers_keys.fragments[number]
        if key in parts:
            continue
        try:
            rows = _read_rows(fragment, assignment.question, partial(earlier, number), session)
        except UnusableFile as error:
            if assignment.run.raises:
                raise
            # Not committed, because the file may be repaired before the next run.
            unusable[key] = _receipt(assignment, fragment, key, unusable=str(error))
        else:
            parts[key] = Part(fragment, key, rows, {name: run for name, (run, _) in read.items()})
            unusable.pop(key, None)  # of a fragment with the same rows, which the output will miss
    return list(parts.values()), list(unusable.values())


def _read_rows(
    fragment: Fragment,
    question: Question,
    earlier: Callable[[str], pa.Table | None],
    session: Session,
) -> list[RowValues | NoPrompt]:
    """The placeholder values of each row. UnusableFile when the fragment cannot be read.

    The first step reads all columns of a local file, because the output needs also those that no
    prompt names. An object in a store is not read in full here, because that would fetch all its
    bytes twice: there, damage is found when writing.
    """
    rows = None
    if Folder(fragment.path).local is not None:
        rows = session.read_once(
            fragment, lambda: read_prompt_rows(fragment, question, earlier, whole=True)
        )
    return read_prompt_rows(fragment, question, earlier) if rows is None else rows


def _read(assignment: Assignment, session: Session) -> _Reading:
    parts, unusable = read_parts(assignment, session)
    question = assignment.question
    rows = list(chain(*(part.rows for part in parts)))
    prompts = [_compact(prompt) for prompt in build_question_prompts(question, rows)]
    # Before inference, so that under `on_error: raise` a bad row costs none.
    _refuse_faults(assignment, parts, map(_reason, prompts))
    keys, distinct = key_prompts(question, prompts)
    # Several questions may be in memory at once, so the values go.
    parts = [replace(part, rows=[]) for part in parts]
    return _Reading(assignment, parts, unusable, prompts, keys, distinct)


def _compact(prompt: Prompt | NoPrompt) -> Prompt | NoPrompt:
    """The prompt with its ids in an array, which takes a seventh of a list's memory."""
    return replace(prompt, ids=array("i", prompt.ids)) if isinstance(prompt, Prompt) else prompt


def _answer_parts(readings: Sequence[_Reading], session: Session) -> list[list[AnswersReceipt]]:
    """Answer all rows of `readings` together and commit the answers; a receipt for each part.

    Every reading is about the same rows.
    """
    wanted = []
    askings = []
    for reading in readings:
        question = reading.assignment.question
        session.progress.add(len(reading.prompts) - len(reading.distinct), computed=False)
        wanted.append((question, reading.distinct))
        askings.append(Asking(question, reading.keys, reading.distinct))
    # Held before the lookup, so that answers which another bundle commits in between are found.
    with session.hold(wanted) as holds:
        answers = find_or_ask(askings, holds, session)
        # While the keys are held: a bundle that waits for them reads this index next.
        return [
            _commit(reading, table, asked, session)
            for reading, (table, asked) in zip(readings, answers, strict=True)
        ]


def _commit(
    reading: _Reading, answers: pa.Table, asked: Asked, session: Session
) -> list[AnswersReceipt]:
    """Commit the answers of all parts, and add them to the index; a receipt for each part."""
    assignment = reading.assignment
    question = assignment.question
    if not reading.parts:
        return []
    known = session.known_answers(question)
    table = in_row_order(question, answers, reading.prompts, reading.keys)
    # Before the commit, so that under `on_error: raise` a failed row is asked again next time.
    faults = table.column(Columns(question.name).error).to_pylist()
    _refuse_faults(assignment, reading.parts, faults)
    receipts = [*_receipts(reading, table, asked)]
    _refuse_hopeless(question, asked, receipts, known, session)
    receipt = BundleReceipt(
        key=assignment.answers_keys.file,
        run=assignment.run.id,
        step=question.name,
        step_key=question.key,
        parts=tuple(receipts),
    )
    known.add(session.ledger.keep_answers(receipt, table))
    return receipts


def _refuse_hopeless(
    question: Question,
    asked: Asked,
    receipts: Sequence[AnswersReceipt],
    known: KnownAnswers,
    session: Session,
) -> None:
    """InputError once the model has failed on every row for one reason: the run must stop.

    Never raised if any answer is known, because then the failing rows are the cause.
    """
    reason = asked.only_reason
    if reason is None or known.any_answer:
        return
    fragments = sum(receipt.computed_rows > 0 for receipt in receipts)
    fragments, rows = session.count_hopeless(question, reason, fragments, len(asked.outcomes))
    if fragments >= HOPELESS_FRAGMENTS and rows >= HOPELESS_ROWS:
        raise InputError(
            f"step {question.name!r}: the model {describe_model(question.model.config)} failed on "
            f"all {rows} rows that it was asked, so the run stopped: {reason}."
        )


def _receipts(reading: _Reading, table: pa.Table, asked: Asked) -> Iterator[AnswersReceipt]:
    """The receipt of each part. Their seconds are in proportion to the prompts asked for them."""
    began = asked.began
    new = dict(asked.outcomes)
    each = asked.seconds / max(1, len(new))
    counter = AnswerCounter(reading.assignment.question.step, table)
    start = 0
    for part in reading.parts:
        rows = slice(start, start + part.fragment.rows)
        prompts = reading.prompts[rows]
        distinct: dict[bytes, Prompt] = {}
        for key, prompt in zip(reading.keys[rows], prompts, strict=True):
            if key is not None and isinstance(prompt, Prompt):
                distinct[key] = prompt
        # A prompt that several parts have was asked for the first of them.
        outcomes = {key: new.pop(key) for key in distinct if key in new}
        yield _receipt(
            reading.assignment,
            part.fragment,
            part.key,
            earlier=part.earlier,
            prompt_lengths=_prompt_lengths(prompts),
            computed_rows=len(outcomes),
            known_rows=len(distinct) - len(outcomes),
            began=began,
            seconds=each * len(outcomes),
            prompt_tokens=sum(len(distinct[key].ids) for key in outcomes),
            completion_tokens=sum(map(_completion_tokens, outcomes.values())),
            **counter.count(rows),
        )
        began += each * len(outcomes)
        start = rows.stop


def _receipt(assignment: Assignment, fragment: Fragment, key: str, **facts: Any) -> AnswersReceipt:
    file_key = assignment.answers_keys.file
    return AnswersReceipt(
        key=key,
        bundle="" if key == file_key else file_key,
        run=assignment.run.id,
        fragment=fragment.name,
        step=assignment.question.name,
        step_key=assignment.question.key,
        model=assignment.question.model.identity,
        rows=fragment.rows,
        **facts,
    )


def _completion_tokens(outcome: Outcome) -> int:
    # Those of all draws of a text; a choice and a fault have none.
    return int(getattr(outcome, "drawn_tokens", getattr(outcome, "completion_tokens", 0)))


def _prompt_lengths(prompts: Sequence[Prompt | NoPrompt]) -> dict[int, int]:
    lengths = (len(prompt.ids) for prompt in prompts if isinstance(prompt, Prompt))
    return Counter(length // LENGTH_BIN * LENGTH_BIN for length in lengths)


def _reason(prompt: Prompt | NoPrompt) -> str | None:
    return prompt.reason if isinstance(prompt, RowFault) else None


def _refuse_faults(
    assignment: Assignment, parts: Sequence[Part], reasons: Iterable[str | None]
) -> None:
    """Under `on_error: raise`, BadRow for the first row with a reason."""
    if not assignment.run.raises:
        return
    left = iter(reasons)
    for part in parts:
        fragment = part.fragment
        for at, reason in enumerate(islice(left, fragment.rows)):
            if reason is not None:
                number = fragment.numbers[at]
                raise BadRow(
                    f"{fragment.path}: row {number}, step {assignment.question.name!r}: {reason}. "
                    "Fix the row, or set on_error to quarantine."
                )
