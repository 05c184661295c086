"""The values that a run passes between calls: small and frozen, never rows, tables or weights.

    Run           the rows to answer, cut into fragments; made by plan_run
    RunContext    the part of a Run that every task needs; its live counterpart is a Session
    Model         a checkpoint that was checked and digested
    Question      one resolved step: all that is needed to ask it about any row
    Bundle        a large fragment, or small ones that share their tasks, and all its assignments
    Assignment    one question over one bundle
    Work          everything a run does, and the order of its passes (plan_passes); made by assign

Knows no engine and no files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel

from glmbatch.glm.checkpoint.config_check import Predicts
from glmbatch.ledger.fragments import Fragment, Plan, bundle_name
from glmbatch.ledger.input.unchanged import basis_of
from glmbatch.ledger.rowkeys import confidence_key
from glmbatch.settings.job import (
    AnyStep,
    ClassifyStep,
    DataConfig,
    GenerateStep,
    ModelConfig,
    RuntimeConfig,
)
from glmbatch.settings.kinds import OutputFormat
from glmbatch.steps.calibration import AnyMap, calibration_digest
from glmbatch.steps.inputs import PromptInputs
from glmbatch.store.inputs.needs import SchemaNeeds

# Both clocks are read once, together: the system time may be changed while the process runs.
_STARTED = time.time() - time.monotonic()


def now() -> float:
    """Seconds since 1970 on a clock that never jumps, so that differences are durations.

    Two processes disagree if the system time was changed between their starts.
    """
    return _STARTED + time.monotonic()


class Model(BaseModel, frozen=True, extra="forbid"):
    """A checkpoint that was checked and digested.

    `identity` changes whenever its answers may change. `config` names its directory on this machine
    and the dtype it computes in. `labels` are those of its trained head, empty without one. `stamp`
    is the state of its files when they were digested. `notes` are warnings that do not stop a run.
    `chats` is true if it was trained on chat rounds. `predicts` is what a trained head predicts.
    `is_tfidf` is true for the exported baseline of a training, whose head is a logistic regression.
    """

    config: ModelConfig
    identity: str
    has_head: bool
    labels: tuple[str, ...]
    parameters: int
    size_bytes: int
    max_positions: int
    stamp: str  # names, sizes and times: cheap to compare, unlike digests of the weights
    chats: bool = True
    predicts: Predicts = "label"
    notes: tuple[str, ...] = ()
    is_tfidf: bool = False


class RunContext(BaseModel, frozen=True, extra="forbid"):
    """The facts about a run that every task needs. `began` is in seconds since 1970.

    `others` are outputs of other jobs whose answers this run may take.
    """

    id: str
    began: float
    output: str
    format: OutputFormat
    table: str = ""
    on_error: Literal["raise", "quarantine", "null"]
    runtime: RuntimeConfig
    others: tuple[str, ...] = ()

    @property
    def raises(self) -> bool:
        """Whether the first bad row or file stops the run."""
        return self.on_error == "raise"


class Run(BaseModel, frozen=True, extra="forbid"):
    """One run of a job: its context, its fragments, and each step's prompt inputs by step name.

    `needs` are the columns that the job reads and writes.
    """

    context: RunContext
    plan: Plan
    inputs: dict[str, PromptInputs]
    needs: SchemaNeeds


class Question(BaseModel, frozen=True, extra="forbid"):
    """One step, resolved against job and model, so that no call after planning needs the job.

    `key` is the step key. `max_prompt_tokens` is the longest prompt that leaves room for an answer.
    `models_at_once` is how many models of the run stay loaded together. `maps` are those of the
    calibration, by the step or by its fields or labels.
    """

    step: AnyStep
    key: str
    inputs: PromptInputs
    chat: bool
    max_prompt_tokens: int
    model: Model
    models_at_once: int  # an engine leaves memory for the caches of the others
    maps: dict[str, AnyMap] = {}

    @property
    def name(self) -> str:
        """The step's name, which is also its answer column."""
        return self.step.name

    @property
    def labels(self) -> Sequence[str]:
        """The labels that a row may get; none if the step chooses no label."""
        if not isinstance(self.step, ClassifyStep) or self.step.number:
            return ()
        return self.step.labels or self.model.labels


def made_with(questions: Sequence[Question]) -> tuple[dict[str, str], str]:
    """What a run's files have in common: the key of each step, and the digest of its maps."""
    keys = {question.name: question.key for question in questions}
    return keys, calibration_digest({question.name: question.maps for question in questions})


def confidence_keys(questions: Sequence[Question]) -> dict[str, str]:
    """What a calibration of each question depends on."""
    keys = {}
    for each in questions:
        keys[each.name] = confidence_key(each.step, each.model.identity, chat=each.chat)
    return keys


def basis_of_run(data: DataConfig, columns: str, questions: Sequence[Question]) -> str:
    """What decides, besides a source, the files that a run of `questions` publishes for it.

    `columns` are those of the table that the source belongs to, as in `Plan`.
    """
    steps = []
    for question in questions:
        # Without what is unset: what was published before it existed stays as it is.
        inputs = question.inputs.model_dump(mode="json", exclude_defaults=True)
        steps.append([question.name, question.key, inputs])
    parts = [steps, data.rows_per_fragment, data.format, data.id_column, data.follow_links]
    lines = data.lines.model_dump(exclude_defaults=True)
    later = [part for part in (made_with(questions)[1], data.columns_out, lines, columns) if part]
    return basis_of([*parts, *later])


class AnswersKeys(BaseModel, frozen=True, extra="forbid"):
    """The key of an answers file, and the answers key of each fragment of its bundle, in order."""

    file: str
    fragments: tuple[str, ...]


class Assignment(BaseModel, frozen=True, extra="forbid"):
    """One question over the fragments of one bundle.

    `earlier` has the keys of each step whose answers the prompts or the condition use. `beside` are
    later assignments over the same bundle that can be answered now: the model reads a text once for
    all.
    """

    run: RunContext  # included so that a task needs no other argument
    fragments: tuple[Fragment, ...]
    question: Question
    answers_keys: AnswersKeys
    earlier: dict[str, AnswersKeys]
    beside: tuple[Assignment, ...] = ()

    @property
    def rows(self) -> int:
        """The rows of its fragments."""
        return sum(fragment.rows for fragment in self.fragments)

    @property
    def name(self) -> str:
        """The names of its fragments, for people."""
        return bundle_name([fragment.name for fragment in self.fragments])


class Bundle(BaseModel, frozen=True, extra="forbid"):
    """The work on fragments that share their tasks: assignments in step order, then the outputs.

    `output_keys` are those of the fragments' output files, in order.
    """

    run: RunContext
    fragments: tuple[Fragment, ...]
    output_keys: tuple[str, ...]
    assignments: tuple[Assignment, ...]

    @property
    def name(self) -> str:
        """The names of its fragments, for people."""
        return bundle_name([fragment.name for fragment in self.fragments])


class Work(BaseModel, frozen=True, extra="forbid"):
    """Everything that `run` does.

    Each pass in `passes` is a tuple of step indexes. Its steps run over all bundles before the next
    pass begins.
    """

    run: Run
    questions: tuple[Question, ...]
    bundles: tuple[Bundle, ...]
    passes: tuple[tuple[int, ...], ...]

    def in_passes(self) -> Iterator[Assignment]:
        """Every assignment, pass by pass; an assignment comes after those whose answers it uses."""
        for steps in self.passes:
            for bundle in self.bundles:
                for index in steps:
                    yield bundle.assignments[index]


def plan_passes(questions: Sequence[Question], *, together: bool) -> tuple[tuple[int, ...], ...]:
    """The passes of a run: for each, the indexes of the steps that run over all bundles.

    One pass if all models stay loaded `together`. Otherwise one pass per model, so that each model
    is loaded once. A model is loaded again only when a step needs an answer that another model
    gives in between.
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
            # In step order, so a step can join the pass that answers its earlier steps.
            if question.model == model and answered.issuperset(question.inputs.earlier):
                current.append(index)
                answered.add(question.name)
        passes.append(tuple(current))
        waiting = [index for index in waiting if index not in current]
    return tuple(passes)


def plan_beside(
    questions: Sequence[Question], passes: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """For each step, the indexes of the later ones that can be asked beside it.

    They choose labels as it does, or generate texts as it does, with the same model, in the same
    pass, and use no answer that is not there when the step is asked.
    """
    beside: list[tuple[int, ...]] = [()] * len(questions)
    answered: set[str] = set()
    for steps in passes:
        for place, index in enumerate(steps):
            later = [other for other in steps[place + 1 :] if _alike(questions, index, other)]
            # One question under two names is asked once, and its answers are reused.
            ready = {
                questions[other].key: other
                for other in reversed(later)
                if questions[other].key != questions[index].key
                and answered.issuperset(questions[other].inputs.earlier)
            }
            beside[index] = tuple(sorted(ready.values()))
            answered.add(questions[index].name)
    return tuple(beside)


def _alike(questions: Sequence[Question], one: int, other: int) -> bool:
    kind = type(questions[one].step)
    same_kind = isinstance(questions[other].step, kind) and kind in (ClassifyStep, GenerateStep)
    return same_kind and questions[one].model == questions[other].model


def with_beside(
    assignments: Sequence[Assignment], beside: Sequence[Sequence[int]]
) -> tuple[Assignment, ...]:
    """The assignments of a bundle, each with those that `plan_beside` found for its step."""
    joined = []
    for assignment, indexes in zip(assignments, beside, strict=True):
        others = tuple(assignments[index] for index in indexes)
        joined.append(assignment.model_copy(update={"beside": others}))
    return tuple(joined)
