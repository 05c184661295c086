"""Answer one question over one fragment: rows, prompts, known or asked answers, commit.

The public calls take and return small references; rows, tables and models stay inside. Each call is
safe to repeat: committed answers are found and reused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import pyarrow as pa

from glmbatch.errors import BadRow, InputError, UnusableFile
from glmbatch.ledger.fragments import Fragment, read_fragment
from glmbatch.ledger.known.answers import Hold, KnownAnswers
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import LENGTH_BIN, AnswersReceipt
from glmbatch.report.log import log_answers
from glmbatch.run.ask import Asked, ask
from glmbatch.run.models import describe_model
from glmbatch.run.session import Session, session_of
from glmbatch.run.triage import build_question_prompts, key_prompts, triage
from glmbatch.run.work import Assignment, Question, now
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import ClassifyStep
from glmbatch.steps.answers import Answer, answers_table
from glmbatch.steps.generate import Writing
from glmbatch.steps.prompt import Prompt, RowFault, RowValues
from glmbatch.store.folder import Folder
from glmbatch.store.values import prompt_values

# A run stops when the model has failed on this many whole fragments and distinct rows without one
# answer. Both limits must be reached, so one odd file of rows too long for memory stops no job.
HOPELESS_FRAGMENTS = 2
HOPELESS_ROWS = 20


def answer(assignment: Assignment) -> AnswersReceipt:
    """Answer one question for every row of one fragment, commit the answers, return their receipt.

    Safe to repeat: if the answers are committed already, returns their receipt. A fragment that
    cannot be read gives a receipt with the reason in `unusable`. Under `on_error: raise` such a
    fragment, or a bad row, raises InputError. TransientError when the machine failed.
    """
    run = assignment.run
    rows = assignment.fragment.rows
    session = session_of(run)
    ledger = session.ledger
    committed = ledger.find_answers(assignment.key, run.id, assignment.earlier)
    if committed is not None:
        # From this run if the task is a retry, else from an earlier run over the same rows.
        session.progress.add(rows, computed=False)
        log_answers(committed, run.id)
        return committed
    try:
        values, earlier_runs = read_prompt_rows(assignment, ledger)
        session.walk_once(assignment.fragment, _read_through)
    except UnusableFile as error:
        if run.raises:
            raise
        # Not committed, because the file may be repaired before the next run.
        session.progress.add(rows, computed=False)
        receipt = _receipt(assignment, unusable=str(error))
        log_answers(receipt, run.id)
        return receipt
    prompts = build_question_prompts(assignment.question, values)
    # Before inference, so that under `on_error: raise` a bad row costs none.
    _refuse_faults(assignment, map(_reason, prompts))
    return _answer_prompts(assignment, prompts, earlier_runs, session)


def _read_through(fragment: Fragment) -> None:
    """Read all columns of a local file. UnusableFile when one cannot be read.

    The output needs every column, also those that no prompt names. An object in a store is not read
    here, because that would fetch all its bytes twice: there, damage is found when writing.
    """
    if Folder(fragment.path).local is not None:
        for _ in read_fragment(fragment):
            pass


def _answer_prompts(
    assignment: Assignment,
    prompts: Sequence[Prompt | RowFault],
    earlier_runs: dict[str, str],
    session: Session,
) -> AnswersReceipt:
    question = assignment.question
    keys, distinct = key_prompts(question, prompts)
    session.progress.add(len(prompts) - len(distinct), computed=False)
    known = session.known_answers(question)
    # Held before the lookup, so that answers which another fragment commits in between are found.
    with known.hold(distinct) as hold:
        answers, asked = _answers(question, distinct, known, hold, session)
        table = _in_row_order(question, answers, prompts, keys)
        # Before the commit, so that under `on_error: raise` a failed row is asked again next time.
        _refuse_faults(assignment, table.column(Columns(question.name).error).to_pylist())
        _refuse_hopeless(question, asked, known, session)
        receipt = _receipt(
            assignment,
            earlier=earlier_runs,
            prompt_lengths=_prompt_lengths(prompts),
            **_counts(question, table),
            **_measured(distinct, asked),
        )
        # While the keys are held: a fragment that waits for them reads this index next.
        known.add(session.ledger.keep_answers(receipt, table), table)
    log_answers(receipt, assignment.run.id)
    return receipt


def _answers(
    question: Question,
    distinct: dict[bytes, Prompt],
    known: KnownAnswers,
    hold: Hold,
    session: Session,
) -> tuple[pa.Table, Asked]:
    """The answers to `distinct` prompts, each once, in any order; and what the model was asked.

    Uses known answers. Asks the model about the keys that this fragment holds, and about another
    fragment's keys only if that fragment failed to commit them.
    """
    sorted_out = triage(question, distinct, known)
    mine: dict[bytes, Prompt] = {}
    others: dict[bytes, Prompt] = {}
    for key, prompt in sorted_out.to_ask.items():
        if key in hold.mine:
            mine[key] = prompt
        else:
            others[key] = prompt
    asked = ask(question, mine, session) if mine else Asked(now(), {})
    parts = [sorted_out.known]
    if others:
        # Fragments in flight may share texts; only one of them asks about each.
        hold.wait_for_others()
        second_look = triage(question, others, known)
        parts.append(second_look.known)
        if second_look.to_ask:  # their holder failed
            asked.outcomes.update(ask(question, second_look.to_ask, session).outcomes)
    outcomes = [Answer(outcome, key) for key, outcome in asked.outcomes.items()]
    parts.append(answers_table(question.step, question.model.labels, outcomes))
    session.progress.add(len(distinct) - len(outcomes), computed=False)
    return pa.concat_tables(parts), asked


def _refuse_hopeless(
    question: Question, asked: Asked, known: KnownAnswers, session: Session
) -> None:
    """InputError once the model has failed on every row for one reason: the run must stop.

    Never raised if any answer is known, because then the failing rows are the cause.
    """
    reason = asked.only_reason
    if reason is None or known.any_answer:
        return
    fragments, rows = session.count_hopeless(question, reason, len(asked.outcomes))
    if fragments >= HOPELESS_FRAGMENTS and rows >= HOPELESS_ROWS:
        raise InputError(
            f"step {question.name!r}: the model {describe_model(question.model.config)} failed on "
            f"all {rows} rows that it was asked, so the run stopped: {reason}."
        )


def _measured(distinct: dict[bytes, Prompt], asked: Asked) -> dict[str, Any]:
    """The fields of a receipt that measure the work: rows, seconds and tokens."""
    completion_tokens = 0
    for outcome in asked.outcomes.values():
        if isinstance(outcome, Writing):
            completion_tokens += outcome.completion_tokens
    return {
        "computed_rows": len(asked.outcomes),
        "known_rows": len(distinct) - len(asked.outcomes),
        "began": asked.began,
        "seconds": now() - asked.began,
        "prompt_tokens": sum(len(distinct[key].ids) for key in asked.outcomes),
        "completion_tokens": completion_tokens,
    }


def read_prompt_rows(
    assignment: Assignment, ledger: Ledger
) -> tuple[list[RowValues], dict[str, str]]:
    """The placeholder values of each row in order; and, by earlier step, the run of its answers.

    Reads only the columns that the prompt names. If an earlier step failed on a row, a RowFault
    takes the value's place. UnusableFile when the fragment cannot be read.
    """
    values: dict[str, Sequence[str | bytes | RowFault | None]] = dict(source_values(assignment))
    runs: dict[str, str] = {}
    for name, key in assignment.earlier.items():
        receipt, table = ledger.read_answers(key)
        # Kept in the receipt: if the earlier step is asked again, these answers are out of date.
        values[name] = earlier_values(table, name)
        runs[name] = receipt.run
    return rows_of(values, assignment.fragment.rows), runs


def rows_of(
    values: Mapping[str, Sequence[str | bytes | RowFault | None]], length: int
) -> list[RowValues]:
    """The rows of columns of `length` values, in order, each with the columns' names as keys."""
    rows: list[RowValues] = []
    for row in range(length):
        rows.append({name: column[row] for name, column in values.items()})
    return rows


def source_values(assignment: Assignment) -> dict[str, list[str | bytes | None]]:
    """For each placeholder with a source column, the values of the fragment's rows in order.

    UnusableFile when the fragment cannot be read.
    """
    columns = assignment.question.inputs.columns
    if not columns:
        return {}
    # Several placeholders may stand for one column, which is read once.
    batches = list(read_fragment(assignment.fragment, sorted(set(columns.values()))))
    if not batches:
        return {name: [] for name in columns}
    table = pa.Table.from_batches(batches)
    return {name: prompt_values(table.column(column)) for name, column in columns.items()}


def earlier_values(table: pa.Table, step: str) -> list[str | RowFault]:
    """The values that a later prompt takes from the answers of `step`, in row order.

    A row on which `step` failed has a RowFault instead.
    """
    values: list[str | RowFault] = []
    faults = table.column(Columns(step).error).to_pylist()
    for value, fault in zip(table.column(step).to_pylist(), faults, strict=True):
        if fault is None:
            values.append(value)
        else:
            values.append(RowFault("earlier_step_failed", f"{step} failed: {fault}"))
    return values


def _in_row_order(
    question: Question,
    answers: pa.Table,
    prompts: Sequence[Prompt | RowFault],
    keys: Sequence[bytes | None],
) -> pa.Table:
    """A table with the answer of each row, or the fault that left it without a prompt, in order."""
    faults = [Answer(prompt) for prompt in prompts if isinstance(prompt, RowFault)]
    table = pa.concat_tables([answers, answers_table(question.step, question.model.labels, faults)])
    answer_keys = answers.column(Columns(question.name).key).to_pylist()
    place_of = {key: place for place, key in enumerate(answer_keys)}
    # Faults follow the answers, in the order of their rows.
    fault_places = count(len(answers))
    places = []
    for key in keys:
        places.append(next(fault_places) if key is None else place_of[key])
    return table.take(pa.array(places, pa.int64()))


def _receipt(assignment: Assignment, **facts: Any) -> AnswersReceipt:
    return AnswersReceipt(
        key=assignment.key,
        run=assignment.run.id,
        fragment=assignment.fragment.name,
        step=assignment.question.name,
        step_key=assignment.question.key,
        model=assignment.question.model.identity,
        rows=assignment.fragment.rows,
        **facts,
    )


def _prompt_lengths(prompts: Sequence[Prompt | RowFault]) -> dict[int, int]:
    lengths: Counter[int] = Counter()
    for prompt in prompts:
        if isinstance(prompt, Prompt):
            lengths[len(prompt.ids) // LENGTH_BIN * LENGTH_BIN] += 1
    return lengths


def _counts(question: Question, table: pa.Table) -> dict[str, Any]:
    """The fields of a receipt that count answers by kind."""
    columns = Columns(question.name)

    def values(column: str) -> list[Any]:
        present: list[Any] = table.column(column).drop_null().to_pylist()
        return present

    faults = Counter(values(columns.error_type))
    if isinstance(question.step, ClassifyStep):
        return {"faults": faults, "labels": Counter(values(columns.answer))}
    # Blank counts as empty: an answer of spaces alone is useless to a reader.
    empty = [text for text in values(columns.answer) if not text.strip()]
    return {
        "faults": faults,
        "finish_reasons": Counter(values(columns.finish_reason)),
        "empty_answers": len(empty),
        "answer_tokens": sum(values(columns.completion_tokens)),
    }


def _reason(prompt: Prompt | RowFault) -> str | None:
    return prompt.reason if isinstance(prompt, RowFault) else None


def _refuse_faults(assignment: Assignment, reasons: Iterable[str | None]) -> None:
    """Under `on_error: raise`, BadRow for the first row with a reason."""
    if not assignment.run.raises:
        return
    for number, reason in enumerate(reasons, assignment.fragment.first_row):
        if reason is not None:
            raise BadRow(
                f"{assignment.fragment.path}: row {number}, step {assignment.question.name!r}: "
                f"{reason}. Fix the row, or set on_error to quarantine."
            )
