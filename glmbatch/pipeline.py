"""Read this first: one fragment from its source to its committed output, in plain calls. Knows nothing of Prefect.

    plan_run -> open_output -> locate_model, prepare_model -> assign    planning.py: what is to be done
    answer (each step) -> write_output                                  here: one fragment, forward only
    publish                                                             publishing.py: audit, then make it public

Calls give and take small references; rows, tables and models stay inside them. Each is safe to repeat: what lies
on disk, whole, is found and not done again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from glmbatch.config import AnyStep, ClassifyStep, GenerateStep, JobConfig
from glmbatch.data.fragments import read_fragment
from glmbatch.data.ledger import AnswersReceipt, Ledger, OutputReceipt
from glmbatch.data.parquet import open_parquet, prompt_values
from glmbatch.data.rowkeys import row_key
from glmbatch.errors import BadRow, InputError, TransientError, UnusableFile
from glmbatch.glm.engine import Engine, load_engine
from glmbatch.glm.pool import POOL
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.planning import (
    Assignment,
    FragmentWork,
    Model,
    assign,
    describe_model,
    job_models,
    locate_model,
    open_output,
    plan_run,
    prepare_model,
    stamp_checkpoint,
)
from glmbatch.progress import PROGRESS
from glmbatch.publishing import Summary, publish
from glmbatch.steps.answers import Answer, answers_table
from glmbatch.steps.classify import Choice, ask_choices, encode_labels
from glmbatch.steps.generate import Writing, ask_writings
from glmbatch.steps.prompt import Prompt, RowFault, RowValues, build_prompts

logger = logging.getLogger(__name__)


def run_job(job: JobConfig) -> Summary:
    """The whole job in this thread, fragment after fragment; what the flow does, without its server and retries."""
    run = plan_run(job)
    open_output(job, run)
    try:
        work = assign(job, run, [prepare_model(locate_model(model, job.runtime)) for model in job_models(job)])
        answers: dict[str, dict[int, AnswersReceipt]] = {each.fragment.name: {} for each in work.fragments}
        for steps in work.passes:
            for each in work.fragments:
                for index in steps:
                    answers[each.fragment.name][index] = answer(job, each.assignments[index])
        outputs = [
            write_output(job, each, [receipt for _, receipt in sorted(answers[each.fragment.name].items())])
            for each in work.fragments
        ]
        return publish(job, run, outputs)
    finally:
        Ledger(job.data.output).close()


def answer(job: JobConfig, assignment: Assignment) -> AnswersReceipt:
    """Answer one step for every row of one fragment and commit the answers, unless they are there already.

    A fragment that cannot be read gives a receipt that says so; under `on_error: raise` it, or a bad row, is an
    InputError. TransientError when the machine failed.
    """
    ledger, step = Ledger(job.data.output), job.steps[assignment.step_index]
    found = ledger.find_answers(assignment.key, assignment.run)
    if found is not None:
        PROGRESS.add(assignment.fragment.rows, computed=False)
        return found
    receipt = AnswersReceipt(
        key=assignment.key,
        run=assignment.run,
        fragment=assignment.fragment.name,
        step=step.name,
        step_key=assignment.step_key,
        rows=assignment.fragment.rows,
    )
    try:
        rows = read_prompt_rows(job, assignment, ledger)
    except UnusableFile as error:
        if job.on_error == "raise":
            raise
        PROGRESS.add(assignment.fragment.rows, computed=False)
        return receipt.model_copy(update={"unusable": str(error)})
    answers, measured = _answer_rows(job, assignment, step, rows)
    values = [each.value for each in answers]
    distinct = {each.key: each.value for each in answers if each.key is not None}
    receipt = receipt.model_copy(
        update={
            "computed_rows": len(distinct),
            "faults": Counter(value.kind for value in values if isinstance(value, RowFault)),
            "labels": Counter(value.label for value in values if isinstance(value, Choice)),
            "completion_tokens": sum(
                value.completion_tokens for value in distinct.values() if isinstance(value, Writing)
            ),
            **measured,
        }
    )
    ledger.keep_answers(receipt, answers_table(step, assignment.model.labels, answers))
    return receipt


def read_prompt_rows(job: JobConfig, assignment: Assignment, ledger: Ledger) -> list[RowValues]:
    """For each row of the fragment, the value of each placeholder of the step's prompt.

    Reads only the columns that the prompt names. A row whose earlier step failed carries that in place of the value.
    """
    columns = job.source_columns(job.steps[assignment.step_index])
    values: dict[str, Sequence[str | bytes | RowFault | None]] = {name: [] for name in columns}
    batches = list(read_fragment(assignment.fragment, sorted(set(columns.values())))) if columns else []
    if batches:
        table = pa.Table.from_batches(batches)
        values = {name: prompt_values(table.column(column)) for name, column in columns.items()}
    for name, key in assignment.earlier.items():
        values[name] = _earlier_answers(ledger.read_answers(key)[1], name)
    return [{name: column[row] for name, column in values.items()} for row in range(assignment.fragment.rows)]


def _earlier_answers(table: pa.Table, step: str) -> list[str | RowFault]:
    faults = table.column(f"{step}_error").to_pylist()
    return [
        value if fault is None else RowFault("earlier_step_failed", f"{step} failed: {fault}")
        for value, fault in zip(table.column(step).to_pylist(), faults, strict=True)
    ]


def _answer_rows(
    job: JobConfig, assignment: Assignment, step: AnyStep, rows: Sequence[RowValues]
) -> tuple[list[Answer], dict[str, float]]:
    """The answer of each row, in the order of `rows`, and what it took; a prompt that repeats is asked once."""
    model = assignment.model
    tokenizer = _tokenizer(model.config.path, model.identity)
    prompts = build_prompts(
        step,
        rows,
        tokenizer,
        text_column=job.data.text_column,
        chat=_uses_chat(step, model),
        max_input_tokens=_max_input_tokens(step, model, tokenizer),
    )
    _refuse_under_raise(job, assignment, prompts)
    keys = [row_key(assignment.step_key, prompt.text) if isinstance(prompt, Prompt) else b"" for prompt in prompts]
    asked = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if isinstance(prompt, Prompt)}
    PROGRESS.add(len(prompts) - len(asked), computed=False)
    began, values = _ask(job, assignment, step, tokenizer, asked) if asked else (time.time(), {})
    outcomes = [
        prompt if isinstance(prompt, RowFault) else values[key] for prompt, key in zip(prompts, keys, strict=True)
    ]
    _refuse_under_raise(job, assignment, outcomes)
    answers = [
        Answer(outcome) if isinstance(outcome, RowFault) else Answer(outcome, key)
        for outcome, key in zip(outcomes, keys, strict=True)
    ]
    return answers, {
        "began": began,
        "seconds": time.time() - began,
        "prompt_tokens": sum(len(prompt.ids) for prompt in asked.values()),
    }


def _ask(
    job: JobConfig, assignment: Assignment, step: AnyStep, tokenizer: Tokenizer, asked: Mapping[bytes, Prompt]
) -> tuple[float, dict[bytes, Choice | Writing | RowFault]]:
    """What the model says to each prompt, and when it began (seconds since 1970; loading comes before)."""
    model, runtime = assignment.model, job.runtime

    def load() -> Engine:
        logger.info("loading %s (%s)", describe_model(model.config), model.config.dtype)
        engine = load_engine(model.config, runtime, assignment.models_at_once)
        if stamp_checkpoint(model.config) != model.stamp:
            engine.close()
            raise InputError(f"{describe_model(model.config)}: was changed since this run took its digests. Run again.")
        return engine

    key = (model.identity, runtime.device, runtime.max_batch_tokens, runtime.max_slots)
    with POOL.lease(key, load, assignment.models_at_once) as engine:
        began = time.time()
        values: dict[bytes, Choice | Writing | RowFault] = {}
        try:
            for row, value in _outcomes(step, model, asked, engine, tokenizer):
                values[row] = value
                PROGRESS.add(1, computed=True)
        except TransientError:
            POOL.check_running()
            POOL.discard(engine)  # a retry loads it anew
            raise
    return began, values


def _outcomes(
    step: AnyStep, model: Model, asked: Mapping[bytes, Prompt], engine: Engine, tokenizer: Tokenizer
) -> Iterator[tuple[bytes, Choice | Writing | RowFault]]:
    if isinstance(step, ClassifyStep):
        return ask_choices(step, model.labels if model.has_head else (), asked, engine, tokenizer)
    return ask_writings(step, asked, engine, tokenizer)


@lru_cache(maxsize=8)
def _tokenizer(path: str, identity: str) -> Tokenizer:
    """The tokenizer of a checkpoint; `identity` makes a changed file a new entry."""
    return load_tokenizer(path)


def _uses_chat(step: AnyStep, model: Model) -> bool:
    return not model.has_head if step.chat is None else step.chat


def _max_input_tokens(step: AnyStep, model: Model, tokenizer: Tokenizer) -> int:
    """Longest prompt: what the setting says, within the positions that the answer leaves."""
    if isinstance(step, GenerateStep):
        answer_tokens = step.max_tokens
    else:
        labels = [] if model.has_head else step.labels or []
        answer_tokens = max((len(ids) for ids in encode_labels(labels, tokenizer)), default=0)
    room = model.max_positions - answer_tokens
    return room if step.max_input_tokens is None else min(room, step.max_input_tokens)


def _refuse_under_raise(job: JobConfig, assignment: Assignment, outcomes: Sequence[object]) -> None:
    if job.on_error != "raise":
        return
    for number, outcome in enumerate(outcomes, assignment.fragment.first_row):
        if isinstance(outcome, RowFault):
            raise BadRow(
                f"{assignment.fragment.path}: row {number}, step {assignment.step!r}: {outcome.reason}. "
                "Mend the row, or set on_error to quarantine."
            )


def write_output(job: JobConfig, work: FragmentWork, answers: Sequence[AnswersReceipt]) -> OutputReceipt:
    """Write the fragment's rows, untouched, with all answers beside them; staged, not yet public.

    A fragment that cannot be read gives a receipt that says so; under `on_error: raise` it is an InputError.
    """
    ledger = Ledger(job.data.output)
    receipt = OutputReceipt(
        key=work.key,
        run=work.run,
        fragment=work.fragment,
        output_name=work.fragment.output_name,
        answers=tuple(answers),
    )
    unusable = next((each.unusable for each in answers if each.unusable is not None), None)
    if unusable is not None:
        return receipt.model_copy(update={"unusable": unusable})
    found = ledger.find_output(work.key, answers)
    if found is not None:
        return found
    tables = [ledger.read_answers(each.key)[1] for each in answers]
    faulty = [f"{each.step}_error" for each in answers]
    receipt = receipt.model_copy(update={"faulty_rows": _count_faulty(tables, faulty)})
    try:
        with open_parquet(Path(work.fragment.path)) as file:
            source = file.schema_arrow
        schema = pa.schema([*source, *(field for table in tables for field in table.schema)], source.metadata)
        return ledger.stage_output(receipt, schema, _rows_with_answers(work, schema, tables))
    except UnusableFile as error:
        if job.on_error == "raise":
            raise
        return receipt.model_copy(update={"unusable": str(error)})


def _count_faulty(tables: Sequence[pa.Table], columns: Sequence[str]) -> int:
    faults = zip(*(table.column(name).to_pylist() for table, name in zip(tables, columns, strict=True)), strict=True)
    return sum(any(fault is not None for fault in row) for row in faults)


def _rows_with_answers(work: FragmentWork, schema: pa.Schema, tables: Sequence[pa.Table]) -> Iterator[pa.RecordBatch]:
    """The source's batches, each with its part of the answers beside it."""
    at = 0
    for batch in read_fragment(work.fragment):
        parts = [table.slice(at, batch.num_rows).combine_chunks() for table in tables]
        columns = [column for part in parts for column in part.columns]
        answers = [pa.concat_arrays(column.chunks) for column in columns]
        yield pa.RecordBatch.from_arrays([*batch.columns, *answers], schema=schema)
        at += batch.num_rows
