"""What a run would do and why, without doing it: loads no model, reads no rows, writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel

from glmbatch.config import JobConfig
from glmbatch.data.fragments import FileFault
from glmbatch.data.ledger import Ledger, Manifest
from glmbatch.planning import (
    Assignment,
    Model,
    assign,
    describe_model,
    job_models,
    locate_model,
    plan_run,
    prepare_model,
)

Reason = Literal["answered already", "new rows", "changed settings or weights", "changed earlier answers"]


class StepPreview(BaseModel, frozen=True, extra="forbid"):
    """One step over one source file: how many rows would be answered or taken as they are, and why."""

    source: str
    step: str
    rows: int
    reused: int
    reasons: tuple[Reason, ...]


class Preview(BaseModel, frozen=True, extra="forbid"):
    """What a run would do. `passes` > 1 means that the models do not fit in memory together."""

    output: str
    rows: int
    fragments: int
    unusable: tuple[FileFault, ...]
    models: tuple[Model, ...]
    passes: int
    steps: tuple[StepPreview, ...]


def preview(job: JobConfig) -> Preview:
    """What a run of `job` would do now. InputError where the run would be refused."""
    run = plan_run(job)
    models = [prepare_model(locate_model(model, job.runtime)) for model in job_models(job)]
    work = assign(job, run, models)
    ledger = Ledger(job.data.output)
    manifest = ledger.manifest()
    tallies: dict[tuple[str, str], tuple[int, int, list[Reason]]] = {}
    for fragment_work in work.fragments:
        for assignment in fragment_work.assignments:
            place = (assignment.fragment.source, assignment.step)
            rows, reused, reasons = tallies.get(place, (0, 0, []))
            found = ledger.find_answers(assignment.key, run.id, retry_failed=job.retry_failed) is not None
            reason = "answered already" if found else _reason(manifest, assignment)
            count = assignment.fragment.rows
            tallies[place] = (rows + count, reused + count * found, [*reasons, *({reason} - set(reasons))])
    return Preview(
        output=job.data.output,
        rows=run.plan.rows,
        fragments=len(work.fragments),
        unusable=run.plan.unusable,
        models=tuple(models),
        passes=len(work.passes),
        steps=tuple(
            StepPreview(source=source, step=step, rows=rows, reused=reused, reasons=tuple(reasons))
            for (source, step), (rows, reused, reasons) in tallies.items()
        ),
    )


def _reason(manifest: Manifest | None, assignment: Assignment) -> Reason:
    """Why these answers are not there: compared with what is published of the same rows of the same file."""
    for file in manifest.files if manifest else ():
        if (file.source, file.first_row, file.source_digest) == (
            assignment.fragment.source,
            assignment.fragment.first_row,
            assignment.fragment.digest,
        ):
            if file.step_keys.get(assignment.step) != assignment.step_key:
                return "changed settings or weights"
            return "changed earlier answers"
    return "new rows"


def describe_plan(plan: Preview) -> str:
    """The preview as text for a person."""
    lines = [f"{plan.rows} rows in {plan.fragments} fragments -> {plan.output}"]
    for model in plan.models:
        size = (
            f"{model.parameters / 1e6:,.1f} million parameters, {model.size_bytes / 1e9:.3f} GB as {model.config.dtype}"
        )
        lines.append(f"model {describe_model(model.config)}: {size}")
    if plan.passes > 1:
        lines.append(f"the models do not fit in memory together: {plan.passes} passes over all fragments")
    lines += [f"left out: {fault.reason}" for fault in plan.unusable]
    return "\n".join([*lines, "", *_table(plan)])


def _table(plan: Preview) -> Iterator[str]:
    width = max((len(each.source) for each in plan.steps), default=4)

    def line(*cells: object) -> str:
        source, step, rows, to_run, reused, why = cells
        return f"{source:<{width}}  {step:<16}  {rows:>9}  {to_run:>9}  {reused:>9}  {why}".rstrip()

    yield line("file", "step", "rows", "to run", "reused", "why")
    totals: Counter[tuple[str, str]] = Counter()
    for each in plan.steps:
        totals.update({(each.step, "rows"): each.rows, (each.step, "reused"): each.reused})
        yield line(each.source, each.step, each.rows, each.rows - each.reused, each.reused, ", ".join(each.reasons))
    for step in dict.fromkeys(each.step for each in plan.steps):
        rows, reused = totals[step, "rows"], totals[step, "reused"]
        yield line("total", step, rows, rows - reused, reused, "")
