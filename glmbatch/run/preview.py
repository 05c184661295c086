"""What a run would do and why, row by row, without doing it: loads no model, writes nothing.

It reads the prompts' columns and tokenizes what would be asked, so the counts are exact. Where a prompt uses an answer
that is not there yet, its row is counted and its tokens are not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel

from glmbatch.errors import UnusableFile
from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest, StepOrigin
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.ledger.rowkeys import answer_settings
from glmbatch.run.asking import forget_answers, keyed, known_answers, prompts_of
from glmbatch.run.canary import check_file
from glmbatch.run.pipeline import earlier_answers, source_values
from glmbatch.run.planning import (
    Assignment,
    FragmentWork,
    Model,
    assign,
    describe_model,
    job_models,
    locate_model,
    plan_run,
    prepare_model,
)
from glmbatch.settings.job import AnyStep, JobConfig
from glmbatch.steps.prompt import Prompt, RowFault

NEW, FAILED = "new text", "failed before"


class StepPreview(BaseModel, frozen=True, extra="forbid"):
    """One step over one source file. `rows` = `to_run` + `reused` + `skipped`.

    `reused` rows have their answer from a row that was, or will be, answered; `skipped` have no prompt. `reasons`
    counts the rows to run and to skip by why. `prompt_tokens` are those of the rows to run, less the `waiting` ones,
    whose prompts use answers that are not there yet.
    """

    source: str
    step: str
    rows: int
    to_run: int
    reused: int
    skipped: int
    waiting: int
    prompt_tokens: int
    reasons: dict[str, int]


class Preview(BaseModel, frozen=True, extra="forbid"):
    """What a run would do. `passes` > 1 means that the models do not fit in memory together.

    `seconds` of inference are estimated from what the published answers took; None when there are none of that step.
    """

    output: str
    rows: int
    fragments: int
    unusable: tuple[FileFault, ...]
    models: tuple[Model, ...]
    passes: int
    steps: tuple[StepPreview, ...]
    seconds: float | None


def preview(job: JobConfig) -> Preview:
    """What a run of `job` would do now. InputError where the run would be refused."""
    check_file(job)
    run = plan_run(job)
    models = [prepare_model(locate_model(model, job.runtime)) for model in job_models(job)]
    work = assign(job, run, models)
    looker = _Looker(job, Ledger(job.data.output))
    for each in work.fragments:
        looker.look(each)
    steps = looker.steps()
    forget_answers(job.data.output)
    return Preview(
        output=job.data.output,
        rows=run.plan.rows,
        fragments=len(work.fragments),
        unusable=(*run.plan.unusable, *looker.unusable),
        models=tuple(models),
        passes=len(work.passes),
        steps=steps,
        seconds=_estimate(steps, looker.ledger),
    )


class _Looker:
    """Looks at one fragment after another, and remembers what an earlier one would have asked."""

    def __init__(self, job: JobConfig, ledger: Ledger) -> None:
        # Known answers with their failures; which of those are tried again is decided here.
        self._job, self.ledger = job.model_copy(update={"retry_failed": False}), ledger
        self._retry_failed = job.retry_failed
        self._manifest = ledger.manifest()
        self._changes: dict[str, str | None] = {}
        self._asked: dict[str, set[bytes]] = defaultdict(set)
        self._counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._reasons: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.unusable: list[FileFault] = []

    def look(self, work: FragmentWork) -> None:
        answers: dict[str, Sequence[str | RowFault | None]] = {}
        try:
            for assignment in work.assignments:
                answers[assignment.step] = self._look(assignment, answers)
        except UnusableFile as error:
            fragment = work.fragment
            self.unusable.append(
                FileFault(source=fragment.source, first_row=fragment.first_row, reason=str(error))
            )

    def _look(
        self, assignment: Assignment, answers: Mapping[str, Sequence[str | RowFault | None]]
    ) -> Sequence[str | RowFault | None]:
        """Count the rows of one step; returns each row's answer where it is known."""
        place = (assignment.fragment.source, assignment.step)
        counts, reasons = self._counts[place], self._reasons[place]
        known, keys, outcomes = self._known(assignment, answers)
        counts["rows"] += assignment.fragment.rows
        if assignment.step not in self._changes:  # the same for all its fragments
            step = self._job.steps[assignment.step_index]
            self._changes[assignment.step] = _what_changed(step, assignment, self._manifest)
        changed = self._changes[assignment.step]
        found: list[str | RowFault | None] = []
        for key, outcome in zip(keys, outcomes, strict=True):
            failed = False
            if key is not None and isinstance(outcome, Prompt):
                answer = known.get(key)
                failed = isinstance(answer, RowFault)
                if answer is not None and not (failed and self._retry_failed):
                    counts["reused"] += 1
                    found.append(answer)
                    continue
                if key in self._asked[assignment.step_key]:
                    counts["reused"] += 1
                    found.append(None)
                    continue
                self._asked[assignment.step_key].add(key)
                counts["prompt_tokens"] += len(outcome.ids)
            if isinstance(outcome, RowFault):
                counts["skipped"] += 1
                reasons[outcome.kind] += 1
            else:
                counts["to_run"] += 1
                counts["waiting"] += outcome is None
                reasons[FAILED if failed else changed or NEW] += 1
            found.append(
                RowFault("earlier_step_failed", outcome.reason)
                if isinstance(outcome, RowFault)
                else None
            )
        return found

    def _known(
        self, assignment: Assignment, answers: Mapping[str, Sequence[str | RowFault | None]]
    ) -> tuple[dict[bytes, str | RowFault], list[bytes | None], list[Prompt | RowFault | None]]:
        """The answers that are there by row key, and each row's key and prompt; None where it waits for an answer."""
        step = self._job.steps[assignment.step_index]
        values: dict[str, Sequence[str | bytes | RowFault | None]] = dict(
            source_values(self._job, assignment)
        )
        earlier = {name: answers[name] for name in assignment.earlier}
        waits = [
            any(column[row] is None for column in earlier.values())
            for row in range(assignment.fragment.rows)
        ]
        values |= earlier
        ready = [
            {name: values[name][row] for name in values}
            for row, wait in enumerate(waits)
            if not wait
        ]
        prompts = prompts_of(self._job, assignment, step, ready)
        ready_keys, asked = keyed(assignment, prompts)
        each_key, each_prompt = iter(ready_keys), iter(prompts)
        keys = [None if wait else next(each_key) for wait in waits]
        outcomes = [None if wait else next(each_prompt) for wait in waits]
        table = known_answers(self._job, assignment, self.ledger).find(asked)
        told = earlier_answers(table, assignment.step)
        return (
            dict(zip(table.column(f"{assignment.step}_key").to_pylist(), told, strict=True)),
            keys,
            outcomes,
        )

    def steps(self) -> tuple[StepPreview, ...]:
        names = ("rows", "to_run", "reused", "skipped", "waiting", "prompt_tokens")
        return tuple(
            StepPreview(
                source=source,
                step=step,
                reasons=dict(self._reasons[source, step].most_common()),
                **{name: counts[name] for name in names},
            )
            for (source, step), counts in self._counts.items()
        )


def _what_changed(step: AnyStep, assignment: Assignment, manifest: Manifest | None) -> str | None:
    """What made the published answers of this step and is different now; None when nothing is, or there are none."""
    published = {file.step_keys.get(step.name) for file in manifest.files} if manifest else set()
    origin = manifest.steps.get(step.name) if manifest else None
    if origin is None or assignment.step_key in published:
        return None
    before, now = origin.model.split("/"), assignment.model.identity.split("/")
    parts = ("weights", "tokenizer", "numbers", "positions")
    changed = [name for name, one, other in zip(parts, before, now, strict=False) if one != other]
    return f"changed {', '.join([*_changed_settings(step, origin), *changed])}"


def _changed_settings(step: AnyStep, origin: StepOrigin) -> list[str]:
    now = answer_settings(step)
    return sorted(
        name
        for name in now.keys() | origin.settings.keys()
        if now.get(name) != origin.settings.get(name)
    )


def _estimate(steps: Sequence[StepPreview], ledger: Ledger) -> float | None:
    """Seconds that the model will take, at the rate of the rows that stand published; None when it cannot be told."""
    to_run = Counter[str]()
    for each in steps:
        to_run[each.step] += each.to_run
    seconds, receipts = 0.0, list(ledger.published_receipts())
    for step, rows in to_run.items():
        rate = _rows_per_second([receipt for receipt in receipts if receipt.step == step])
        if rows and rate is None:
            return None
        seconds += rows / rate if rate else 0.0
    return seconds


def _rows_per_second(receipts: Sequence[AnswersReceipt]) -> float | None:
    """Of the latest run that computed any; fragments overlap, so from the first start to the last end."""
    busy = [receipt for receipt in receipts if receipt.computed_rows]
    if not busy:
        return None
    latest = max(busy, key=lambda receipt: receipt.began).run
    busy = [receipt for receipt in busy if receipt.run == latest]
    seconds = max(each.began + each.seconds for each in busy) - min(each.began for each in busy)
    return sum(each.computed_rows for each in busy) / seconds if seconds else None


def describe_plan(plan: Preview) -> str:
    """The preview as text for a person."""
    lines = [f"{plan.rows} rows in {plan.fragments} fragments -> {plan.output}"]
    for model in plan.models:
        size = (
            f"{model.parameters / 1e6:,.1f} million parameters, "
            f"{model.size_bytes / 1e9:.3f} GB as {model.config.dtype}"
        )
        lines.append(f"model {describe_model(model.config)}: {size}")
    if plan.passes > 1:
        lines.append(
            f"the models do not fit in memory together: {plan.passes} passes over all fragments"
        )
    lines += [f"left out: {fault.reason}" for fault in plan.unusable]
    lines += ["", *_table(plan)]
    if any(each.waiting for each in plan.steps):
        lines += ["", "Tokens are not counted where a prompt waits for an earlier step's answer."]
    if plan.seconds is not None and any(each.to_run for each in plan.steps):
        lines += ["", f"about {plan.seconds:,.0f} s of inference, at the rate of the last run"]
    return "\n".join(lines)


def _table(plan: Preview) -> Iterator[str]:
    width = max((len(each.source) for each in plan.steps), default=4)

    def line(*cells: object) -> str:
        source, step, *numbers, why = cells
        middle = "  ".join(f"{number:>9}" for number in numbers)
        return f"{source:<{width}}  {step:<16}  {middle}  {why}".rstrip()

    names = ("rows", "to_run", "reused", "skipped", "prompt_tokens")
    yield line("file", "step", "rows", "to run", "reused", "skipped", "tokens", "why")
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for each in plan.steps:
        totals[each.step].update({name: getattr(each, name) for name in names})
        why = ", ".join(f"{reason} {rows}" for reason, rows in each.reasons.items())
        yield line(each.source, each.step, *(getattr(each, name) for name in names), why)
    for step, total in totals.items():
        yield line("total", step, *(total[name] for name in names), "")
