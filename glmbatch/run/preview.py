"""Preview a run: what it would do with each row, and why. Loads no model and writes nothing.

The preview reads the columns that prompts use and tokenizes every prompt, so its counts are exact.
A prompt that needs an answer which does not exist yet counts as a row, but its tokens do not count.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import pyarrow as pa
from pydantic import BaseModel

from glmbatch.errors import AuditError, UnusableFile, counted, shown
from glmbatch.ledger.fragments import FileFault, Fragment, Plan
from glmbatch.ledger.input.unchanged import receipts_of
from glmbatch.ledger.known.answers import KnownAnswers
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import PublishedFile
from glmbatch.ledger.staying import Filtered, filtered
from glmbatch.report.counts import latest_rate
from glmbatch.run.answer import find_answers
from glmbatch.run.audits import check_errors
from glmbatch.run.canary import check_canary_file
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import assign, plan_run
from glmbatch.run.promotion.changes import what_changed
from glmbatch.run.promotion.measure import preview_measures
from glmbatch.run.prompts import (
    Earlier,
    build_question_prompts,
    earlier_values,
    key_prompts,
    prompt_notes,
    prompt_rows,
    source_table,
    triage,
    with_reasons,
)
from glmbatch.run.session import index_answers
from glmbatch.run.work import Bundle, Model, Question
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import JobConfig
from glmbatch.steps.prompt import NoPrompt, NotAsked, Prompt, RowFault
from glmbatch.store.inputs.found import Skipped, Version

NEW = "new text"
FAILED = "failed before"

AnswersPlace = tuple[str, str]  # the keys of an answers file and of a fragment's answers in it


class StepPreview(BaseModel, frozen=True, extra="forbid"):
    """One step over one source file. Each row is counted once, from `to_run` to `not_asked`.

    `reused` rows have a known answer, or that of another fragment or step. `repeated` ones have the
    prompt of an earlier row of their fragment. `skipped` rows have no prompt, `not_asked` ones do
    not meet the step's condition. `waiting` rows are the part of `to_run` whose prompts need
    answers that do not exist yet; `prompt_tokens` counts the other rows to run. `reasons` counts
    rows to run or skip.
    """

    source: str
    step: str
    reasons: dict[str, int]
    rows: int = 0
    to_run: int = 0
    reused: int = 0
    repeated: int = 0
    skipped: int = 0
    not_asked: int = 0
    waiting: int = 0
    prompt_tokens: int = 0


class Preview(BaseModel, frozen=True, extra="forbid"):
    """What a run would do. `passes` > 1 means that the models do not fit in memory together.

    `seconds` is the inference time, estimated from that of the published answers; None if no run
    has published enough answers of a step to run. `refused` says why a run would publish nothing,
    if too many rows are in unusable files or have no prompt, or a measured change did not pass.
    `notes` are remarks on the prompts. `version` is that of the table which is read.
    `measured_first` says which steps are measured on labelled rows before, and why.
    """

    output: str
    rows: int
    fragments: int
    unusable: tuple[FileFault, ...]
    models: tuple[Model, ...]
    passes: int
    steps: tuple[StepPreview, ...]
    seconds: float | None
    skipped: tuple[Skipped, ...] = ()
    unchanged_sources: int = 0
    filtered: Filtered | None = None
    version: Version | None = None
    refused: str | None = None
    notes: tuple[str, ...] = ()
    measured_first: str | None = None


def preview(job: JobConfig) -> Preview:
    """What a run of `job` would do now. InputError when the run could not start."""
    job = job.dated()
    check_canary_file(job)  # a run would refuse the same files
    run = plan_run(job)
    models = prepare_models(job)
    work = assign(job, run, models)
    plan = work.run.plan
    ledger = Ledger(job.data.output)
    counted = _Counted(ledger, work.questions)
    unusable = [*plan.unusable, *_count(counted, work.bundles, ledger)]
    first, refused = preview_measures(job.evaluate, job.data, work.run, work.questions)
    manifest = ledger.manifest()
    published = manifest.files if manifest is not None else ()
    unchanged = [file for file in published if file.source in plan.unchanged]
    steps = (*counted.steps(), *_unchanged_steps(len(plan.unchanged), unchanged))
    return Preview(
        output=job.data.output,
        rows=plan.rows + sum(file.rows for file in unchanged),
        fragments=len(plan.fragments) + len(unchanged),
        unusable=tuple(unusable),
        models=tuple(models),
        passes=len(work.passes),
        steps=steps,
        seconds=_estimate(steps, ledger),
        skipped=plan.skipped,
        unchanged_sources=len(plan.unchanged),
        filtered=filtered(plan, unchanged),
        version=plan.version,
        refused=refused or _refusal(plan, job.max_error_rate, unchanged, counted),
        measured_first=first,
        notes=prompt_notes(work.questions),
    )


def _count(counted: _Counted, bundles: Sequence[Bundle], ledger: Ledger) -> list[FileFault]:
    """Count the rows of all fragments, and return why the others cannot be read."""
    faults = []
    for bundle in bundles:
        committed = _committed(bundle, ledger)
        for number, fragment in enumerate(bundle.fragments):
            keys = {}
            for assignment in bundle.assignments:
                answers = assignment.answers_keys
                keys[assignment.question.name] = (answers.file, answers.fragments[number])
            try:
                counted.add(fragment, keys, committed)
            except UnusableFile as error:
                source, first_row = fragment.source, fragment.first_row
                faults.append(FileFault(source=source, first_row=first_row, reason=shown(error)))
    return faults


def _committed(bundle: Bundle, ledger: Ledger) -> set[str]:
    """The steps whose answers over all rows of `bundle` are committed and stay as they are."""
    assignments = bundle.assignments
    return {each.question.name for each in assignments if find_answers(each, ledger) is not None}


def _unchanged_steps(sources: int, files: Sequence[PublishedFile]) -> Iterator[StepPreview]:
    """The rows of unchanged sources, one preview for each step."""
    for receipt in receipts_of(files):
        failed = sum(receipt.faults.values())
        yield StepPreview(
            source=counted(sources, "unchanged file"),
            step=receipt.step,
            rows=receipt.rows,
            reused=receipt.rows - failed - receipt.not_asked,
            skipped=failed,
            not_asked=receipt.not_asked,
            reasons=dict(receipt.faults),
        )


def _refusal(
    plan: Plan, max_error_rate: float, unchanged: Sequence[PublishedFile], counted: _Counted
) -> str | None:
    try:
        check_errors(
            plan,
            [],
            max_error_rate,
            unchanged,
            faulty_rows=counted.faulty_rows,
            faults=counted.faults,
        )
    except AuditError as error:
        return str(error)
    return None


class _Counted:
    """The counts of the fragments added so far, and the row keys that they would ask about."""

    def __init__(self, ledger: Ledger, questions: Sequence[Question]) -> None:
        manifest = ledger.manifest()
        self._questions = questions
        self._known: dict[tuple[str, str], KnownAnswers] = {}
        self._changes: dict[str, str | None] = {}
        for question in questions:
            # With failures, which tell a row that failed before from a new one.
            known = index_answers(ledger, question, include_failed=True)
            self._known[question.name, question.key] = known
            self._changes[question.name] = what_changed(question, manifest)
        # By step key, because steps with the same question share answers.
        self._asked: dict[str, dict[bytes | None, AnswersPlace | None]] = defaultdict(dict)
        self._counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        # Rows of which a step cannot be asked, each once, and why.
        self.faulty_rows = 0
        self.faults: Counter[str] = Counter()
        self._reasons: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def add(
        self, fragment: Fragment, keys: Mapping[str, AnswersPlace], committed: Collection[str]
    ) -> None:
        """Count the rows of one fragment, step by step. UnusableFile when it cannot be read.

        `keys` say where the answers of each step will be. Those of `committed` steps are there.
        """
        answers: dict[str, Earlier] = {}
        for question in self._questions:
            place = None if question.name in committed else keys[question.name]
            answers[question.name] = self._add(fragment, question, answers, place)
        faulty: set[int] = set()
        for earlier in answers.values():
            faulty.update(row for row, x in enumerate(earlier.values) if isinstance(x, RowFault))
        self.faulty_rows += len(faulty)

    def _add(
        self,
        fragment: Fragment,
        question: Question,
        answers: Mapping[str, Earlier],
        answers_place: AnswersPlace | None,
    ) -> Earlier:
        """Count the rows of one step; return the known answers, in row order.

        Without an `answers_place` they are committed.
        """
        prompts = _prompts(fragment, question, answers)
        keys, distinct = key_prompts(question, prompts)
        sorted_out = triage(question, distinct, self._known[question.name, question.key])
        known = _places_by_key(question, sorted_out.known)
        place = (fragment.source, question.name)
        in_fragment: set[bytes | None] = set()
        self._counts[place]["rows"] += len(prompts)
        for key, prompt in zip(keys, prompts, strict=True):
            if isinstance(prompt, NotAsked):
                self._counts[place]["not_asked"] += 1
                continue
            if isinstance(prompt, RowFault):
                self._counts[place]["skipped"] += 1
                self._reasons[place][prompt.kind] += 1
                self.faults[prompt.kind] += 1
                continue
            asked = self._asked[question.key]
            # Known, or asked for an earlier row, fragment or step with the same text.
            if key in known or key in asked:
                # Fragments with the same rows share their answers.
                repeats = key in in_fragment or asked.get(key) == answers_place
                reused = answers_place is None or not repeats
                self._counts[place]["reused" if reused else "repeated"] += 1
                in_fragment.add(key)
                continue
            self._count_asked(place, prompt)
            reason = FAILED if key in sorted_out.failed else self._changes[question.name]
            self._reasons[place][reason or NEW] += 1
            if key is not None:
                in_fragment.add(key)
                asked[key] = answers_place
        return _known(question, prompts, [known.get(key) for key in keys], sorted_out.known)

    def _count_asked(self, place: tuple[str, str], prompt: Prompt | None) -> None:
        counts = self._counts[place]
        counts["to_run"] += 1
        if prompt is None:
            counts["waiting"] += 1
        else:
            counts["prompt_tokens"] += len(prompt.ids)

    def steps(self) -> tuple[StepPreview, ...]:
        """The counts of each source file and step, in the order in which they were added."""
        previews = []
        for (source, step), counts in self._counts.items():
            reasons = dict(self._reasons[source, step].most_common())
            previews.append(StepPreview(source=source, step=step, reasons=reasons, **counts))
        return tuple(previews)


def _prompts(
    fragment: Fragment, question: Question, answers: Mapping[str, Earlier]
) -> list[Prompt | NoPrompt | None]:
    """The prompt of each row in order, or why it has none; None if it waits for an answer."""
    rows = prompt_rows(question, source_table(fragment, question), answers)
    built = iter(build_question_prompts(question, [row for row in rows if row is not None]))
    return [None if row is None else next(built) for row in rows]


def _places_by_key(question: Question, answers: pa.Table) -> dict[bytes | None, int]:
    keys = answers.column(Columns(question.name).key).to_pylist()
    return {key: place for place, key in enumerate(keys)}


def _known(
    question: Question,
    prompts: Sequence[Prompt | NoPrompt | None],
    places: Sequence[int | None],
    answers: pa.Table,
) -> Earlier:
    """What later steps take from `answers`, of which each row has the one at its place."""
    table = with_reasons(answers.take(pa.array(places, pa.int64())), question.name, prompts)
    values: list[str | NoPrompt | None] = list(earlier_values(table, question.name))
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        if place is None and not isinstance(prompt, NoPrompt):
            values[row] = None  # still to be asked
    return Earlier(values, table)


def _estimate(steps: Sequence[StepPreview], ledger: Ledger) -> float | None:
    """Seconds of inference at the rate of the published rows; None if the rate is unknown."""
    to_run: Counter[str] = Counter()
    for step in steps:
        if step.to_run:
            to_run[step.step] += step.to_run
    if not to_run:
        return 0.0  # without opening each published file
    receipts = list(ledger.published_receipts())
    seconds = 0.0
    for name, rows in to_run.items():
        rate = latest_rate([receipt for receipt in receipts if receipt.step == name])
        if rate is None:
            return None
        seconds += rows / rate
    return seconds
