"""What a run passes from one call to the next: small frozen values, never rows, tables or weights.

    Run           which rows, in which fragments; made by plan_run
    RunContext    the part of it that every task needs; what a process holds for it is a Session
    Model         a checkpoint that was checked and digested
    PromptInputs  where the placeholders of one template get their values
    Question      one step, resolved: all that is needed to ask it of any rows
    Assignment    one question over one fragment
    FragmentWork  all assignments of one fragment, and its output file
    Work          all of a run, and the order of its passes (plan_passes); made by assign

Knows no engine and no files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel

from glmbatch.ledger.fragments import Fragment, Plan
from glmbatch.settings.job import AnyStep, ModelConfig, RuntimeConfig

# Read together once: the time of day may be set while a process runs.
_STARTED = time.time() - time.monotonic()


def now() -> float:
    """Seconds since 1970 by a clock that never jumps, so that differences are durations.

    Processes that started before and after the time of day was set do not agree.
    """
    return _STARTED + time.monotonic()


class Model(BaseModel, frozen=True, extra="forbid"):
    """A checkpoint that was checked and digested.

    `identity` changes whenever its answers may. `config` names its directory on this machine and
    the dtype it computes in; `labels` are those of its trained head; `stamp` is the state of its
    files when they were digested. `notes` are what is odd about it, and does not stop it.
    `chats`: it was trained on the rounds of a chat.
    """

    config: ModelConfig
    identity: str
    has_head: bool
    labels: tuple[str, ...]
    parameters: int
    size_bytes: int
    max_positions: int
    stamp: str  # size and times: cheap to compare with before the weights are loaded
    chats: bool = True
    notes: tuple[str, ...] = ()


class RunContext(BaseModel, frozen=True, extra="forbid"):
    """What every task of a run knows of it. `began` is in seconds since 1970."""

    id: str
    began: float
    output: str
    format: Literal["parquet", "delta"]
    on_error: Literal["raise", "quarantine", "null"]
    runtime: RuntimeConfig

    @property
    def raises(self) -> bool:
        """Whether the first bad row or file stops the run."""
        return self.on_error == "raise"


class PromptInputs(BaseModel, frozen=True, extra="forbid"):
    """Where the placeholders of one prompt template get their values.

    `columns` maps placeholders to source columns, `earlier` names the steps whose answers are used,
    and `texts` are the placeholders that stand for the text: the ones that may not be blank and
    that are cut when a prompt is long.
    """

    columns: dict[str, str]
    earlier: tuple[str, ...]
    texts: tuple[str, ...]


class Run(BaseModel, frozen=True, extra="forbid"):
    """One run of a job: its context, its fragments, and each step's prompt inputs by step name."""

    context: RunContext
    plan: Plan
    inputs: dict[str, PromptInputs]


class Question(BaseModel, frozen=True, extra="forbid"):
    """One step, resolved against job and model: nothing after planning reads the job for it.

    `key` is the step key. `max_prompt_tokens` is the longest prompt that leaves room for an answer.
    `models_at_once` models of the run stay loaded together.
    """

    step: AnyStep
    key: str
    inputs: PromptInputs
    chat: bool
    max_prompt_tokens: int
    model: Model
    models_at_once: int  # so that an engine leaves room for the caches of the others

    @property
    def name(self) -> str:
        """The step's name, which is also its answer column."""
        return self.step.name


class Assignment(BaseModel, frozen=True, extra="forbid"):
    """One question over one fragment.

    `key` is the answers key; `earlier` maps the steps whose answers the prompts use to their
    answers keys.
    """

    run: RunContext  # small, so that a task needs no other argument
    fragment: Fragment
    question: Question
    key: str
    earlier: dict[str, str]


class FragmentWork(BaseModel, frozen=True, extra="forbid"):
    """The work on one fragment: its assignments in step order, then its output under `key`."""

    run: RunContext
    fragment: Fragment
    key: str
    assignments: tuple[Assignment, ...]


class Work(BaseModel, frozen=True, extra="forbid"):
    """All there is to do.

    `passes` holds indexes of steps: those of one pass run together over all fragments before the
    next pass begins.
    """

    questions: tuple[Question, ...]
    fragments: tuple[FragmentWork, ...]
    passes: tuple[tuple[int, ...], ...]

    def in_passes(self) -> Iterator[Assignment]:
        """Every assignment, pass after pass, each after those whose answers it uses."""
        for steps in self.passes:
            for fragment in self.fragments:
                for index in steps:
                    yield fragment.assignments[index]


def plan_passes(questions: Sequence[Question], *, together: bool) -> tuple[tuple[int, ...], ...]:
    """Indexes of the steps that run together over all fragments, pass after pass.

    One pass where all models stay loaded `together`. Otherwise one pass for each model, so that
    none is loaded twice, except where a step needs an answer of another model in between.
    """
    waiting = list(range(len(questions)))
    if together:
        return (tuple(waiting),)
    passes: list[tuple[int, ...]] = []
    answered: set[str] = set()
    while waiting:
        model = questions[waiting[0]].model
        current: list[int] = []
        for index in waiting:
            question = questions[index]
            # In step order, so that a step joins the pass in which its earlier answers are made.
            if question.model == model and answered.issuperset(question.inputs.earlier):
                current.append(index)
                answered.add(question.name)
        passes.append(tuple(current))
        waiting = [index for index in waiting if index not in current]
    return tuple(passes)
