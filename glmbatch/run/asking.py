"""From rows to prompts to answers: those that are known, then the model's. Each row key is asked about once.

Knows no files of the source.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import pyarrow as pa

from glmbatch.errors import InputError, TransientError
from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.engine.pool import POOL
from glmbatch.glm.engine.protocol import Engine
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.ledger.known import Hold, KnownAnswers
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.rowkeys import row_key
from glmbatch.report.progress import PROGRESS
from glmbatch.run.planning import Assignment, Model, describe_model, stamp_checkpoint
from glmbatch.settings.job import AnyStep, ClassifyStep, GenerateStep, JobConfig
from glmbatch.steps.answers import Answer, answers_schema, answers_table
from glmbatch.steps.classify import Choice, ask_choices, encode_labels
from glmbatch.steps.generate import Writing, ask_writings
from glmbatch.steps.prompt import Prompt, RowFault, RowValues, build_prompts
from glmbatch.store.paths import location

logger = logging.getLogger(__name__)

# The answers that need not be asked for again, of the run that is on.
_KNOWN: dict[tuple[str, str, str, str], KnownAnswers] = {}
_KNOWN_LOCK = threading.Lock()


def forget_answers(output: str) -> None:
    """Let go the indexes over `output`."""
    root = str(location(output).resolve())
    with _KNOWN_LOCK:
        for key in [key for key in _KNOWN if key[0] == root]:
            del _KNOWN[key]


def prompts_of(
    job: JobConfig, assignment: Assignment, step: AnyStep, rows: Sequence[RowValues]
) -> list[Prompt | RowFault]:
    """The prompt of each row, in the order of `rows`, or why it has none."""
    model = assignment.model
    tokenizer = tokenizer_of(model.config.path, model.identity)
    return build_prompts(
        step,
        rows,
        tokenizer,
        text_column=job.data.text_column,
        chat=_uses_chat(step, model),
        max_input_tokens=_max_input_tokens(step, model, tokenizer),
    )


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


def keyed(
    assignment: Assignment, prompts: Sequence[Prompt | RowFault]
) -> tuple[list[bytes | None], dict[bytes, Prompt]]:
    """The row key of each prompt, None where there is none, and each distinct prompt under its key."""
    keys = [
        row_key(assignment.step_key, each.text) if isinstance(each, Prompt) else None
        for each in prompts
    ]
    return keys, {
        key: each
        for key, each in zip(keys, prompts, strict=True)
        if isinstance(each, Prompt) and key
    }


def answers_to(
    job: JobConfig,
    assignment: Assignment,
    asked: Mapping[bytes, Prompt],
    known: KnownAnswers,
    hold: Hold,
) -> tuple[pa.Table, dict[str, float]]:
    """The answers under the keys `asked`, each once, in any order, and what they took.

    What is known is taken as it is; of the rest, the model is asked about the keys on `hold`, and about another
    fragment's only where that one failed to commit them.
    """
    step = job.steps[assignment.step_index]
    found = known.find(asked)
    left = _not_in(found, asked, assignment)
    first = {key: prompt for key, prompt in left.items() if key in hold.mine}
    began, values = ask(job, assignment, first) if first else (time.time(), {})
    others = {key: prompt for key, prompt in left.items() if key not in hold.mine}
    if others:
        hold.wait_for_others()
        theirs = known.find(others)
        found = pa.concat_tables([found, theirs])
        lost = _not_in(theirs, others, assignment)
        if lost:
            values |= ask(job, assignment, lost)[1]
    computed = answers_table(
        step, assignment.model.labels, [Answer(value, key) for key, value in values.items()]
    )
    PROGRESS.add(len(asked) - len(values), computed=False)
    return pa.concat_tables([found, computed]), {
        "computed_rows": len(values),
        "known_rows": len(asked) - len(values),
        "began": began,
        "seconds": time.time() - began,
        "prompt_tokens": sum(len(asked[key].ids) for key in values),
        "completion_tokens": sum(
            value.completion_tokens for value in values.values() if isinstance(value, Writing)
        ),
    }


def _not_in(
    answers: pa.Table, asked: Mapping[bytes, Prompt], assignment: Assignment
) -> dict[bytes, Prompt]:
    return {
        key: asked[key]
        for key in asked.keys() - set(answers.column(f"{assignment.step}_key").to_pylist())
    }


def known_answers(job: JobConfig, assignment: Assignment, ledger: Ledger) -> KnownAnswers:
    """One index for each step of a run, which its fragments add to; those of the output's earlier runs are let go."""
    key = (str(ledger.root.resolve()), assignment.run, assignment.step, assignment.step_key)
    with _KNOWN_LOCK:
        if key not in _KNOWN:
            for other in [other for other in _KNOWN if other[0] == key[0] and other[1] != key[1]]:
                del _KNOWN[other]
            step = job.steps[assignment.step_index]
            _KNOWN[key] = KnownAnswers(
                list(ledger.answer_files(assignment.step_key)),
                assignment.step,
                answers_schema(step, assignment.model.labels),
                retry_failed=job.retry_failed,
            )
        return _KNOWN[key]


def ask(
    job: JobConfig, assignment: Assignment, asked: Mapping[bytes, Prompt], *, counted: bool = True
) -> tuple[float, dict[bytes, Choice | Writing | RowFault]]:
    """What the model says to each prompt, and when it began (seconds since 1970; loading comes before)."""
    step = job.steps[assignment.step_index]
    model, runtime = assignment.model, job.runtime
    tokenizer = tokenizer_of(model.config.path, model.identity)

    def load() -> Engine:
        logger.info("loading %s (%s)", describe_model(model.config), model.config.dtype)
        engine = load_engine(model.config, runtime, assignment.models_at_once)
        if stamp_checkpoint(model.config) != model.stamp:
            engine.close()
            raise InputError(
                f"{describe_model(model.config)}: was changed since this run took its digests. Run again."
            )
        return engine

    key = (model.identity, runtime.device, runtime.max_batch_tokens, runtime.max_slots)
    with POOL.lease(key, load, assignment.models_at_once) as engine:
        began = time.time()
        values: dict[bytes, Choice | Writing | RowFault] = {}
        try:
            for row, value in _outcomes(step, model, asked, engine, tokenizer):
                values[row] = value
                PROGRESS.add(1 if counted else 0, computed=True)
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
def tokenizer_of(path: str, identity: str) -> Tokenizer:
    """The tokenizer of a checkpoint; `identity` makes a changed file a new entry."""
    return load_tokenizer(path)
