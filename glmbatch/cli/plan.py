"""What `glmbatch plan` shows: a preview as text for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from glmbatch.errors import counted, shown
from glmbatch.report.counts import RATED_ROWS
from glmbatch.report.text import left_out
from glmbatch.run.models import describe_model
from glmbatch.run.preview import Preview
from glmbatch.run.work import Model


def describe_plan(plan: Preview) -> str:
    """The preview as text for people, in lines without a final newline."""
    size = f"{counted(plan.rows, 'row')} in {counted(plan.fragments, 'fragment')}"
    lines = [f"{size} -> {plan.output}"]
    if plan.version is not None:
        lines.append(f"reads {plan.version}")
    if plan.filtered is not None:
        lines.append(f"where {plan.filtered}")
    for model in plan.models:
        lines.append(f"model {describe_model(model.config)}: {_size(model)}")
        lines += [f"  note: {note}" for note in model.notes]
    lines += [f"note: {note}" for note in plan.notes]
    if plan.passes > 1:
        lines.append(
            f"the models do not fit in memory together: {plan.passes} passes over all fragments"
        )
    if plan.measured_first:
        lines.append(f"measured first: {plan.measured_first}")
    lines += left_out(plan.unusable, "left out: ")
    if plan.skipped:
        lines.append(f"not read: {', '.join(map(str, plan.skipped))}")
    if plan.refused:
        lines.append(f"would be refused: {plan.refused}")
    lines += ["", *_table(plan)]
    if any(step.waiting for step in plan.steps):
        lines += [
            "",
            "Where a prompt or condition waits for an earlier answer, fewer rows may run, "
            "and tokens are not counted.",
        ]
    if plan.seconds is not None and any(step.to_run for step in plan.steps):
        rate = f"the rate of the last run of at least {RATED_ROWS} rows"
        lines += ["", f"about {plan.seconds:,.0f} s of inference, at {rate}"]
    return "\n".join(lines)


def _size(model: Model) -> str:
    if model.is_tfidf:  # thousands of numbers, not millions
        size = f"{counted(model.parameters, 'parameter')}, {model.size_bytes / 1e6:.3f} MB"
    else:
        size = f"{model.parameters / 1e6:,.1f} million parameters, {model.size_bytes / 1e9:.3f} GB"
    return f"{size} as {model.config.dtype}"


def _table(plan: Preview) -> Iterator[str]:
    width = len(max((shown(step.source) for step in plan.steps), key=len, default="file"))

    def line(source: str, step: str, numbers: Sequence[object], why: str) -> str:
        middle = "  ".join(f"{number:>9}" for number in numbers)
        return f"{source:<{width}}  {step:<16}  {middle}  {why}".rstrip()

    # Waiting rows are part of those to run; a sentence below the table mentions them.
    names = {"rows": "rows", "to_run": "to run", "reused": "reused"}
    if any(step.repeated for step in plan.steps):
        names["repeated"] = "repeated"
    names["skipped"] = "skipped"
    if any(step.not_asked for step in plan.steps):
        names["not_asked"] = "not asked"
    names["prompt_tokens"] = "tokens"
    yield line("file", "step", list(names.values()), "why")
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for step in plan.steps:
        numbers = step.model_dump(include=set(names))
        totals[step.step].update(numbers)
        why = ", ".join(f"{reason} {rows}" for reason, rows in step.reasons.items())
        yield line(shown(step.source), step.step, list(map(numbers.__getitem__, names)), why)
    for name, total in totals.items():
        yield line("total", name, list(map(total.__getitem__, names)), "")
