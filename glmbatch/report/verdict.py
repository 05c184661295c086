"""Three lines that answer: may I trust tonight? Published or not, what changed, what to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from glmbatch.errors import counted
from glmbatch.report.counts import population_stability, total, with_unlabelled
from glmbatch.report.facts import Report, Verdict, errors_by_reason
from glmbatch.report.summary import Summary, short
from glmbatch.report.trends import PastRun, PastStep, past_run, usual

# A smaller change is not worth a reader's minute, however steady the nights before were.
FAILED = 0.01  # of all rows
CONFIDENCE = 0.03
LENGTH = 0.15  # of the usual length
SPEED = 0.5  # of the usual speed, because machines and sizes of nights differ
SHIFT = 0.1  # of label shares, as a population stability index
NAMED = 2  # places to look at first
REASON_CHARS = 400


def verdict(report: Report, past: Sequence[PastRun]) -> Verdict:
    """The verdict on a run. The norm is the published ones among the `past` runs."""
    now = past_run(report, 0.0)
    norm = [run for run in past if run.published and run.steps.keys() & now.steps.keys()]
    changes = []
    for name, step in now.steps.items():
        before = [run.steps[name] for run in norm if name in run.steps]
        if before:
            changes += [f"{name}: {change}" for change in _changes(step, before)]
    places = list(islice(_places(report), NAMED))
    looks = f"Look first at {'; '.join(places)}." if places else "Nothing asks for a look."
    return Verdict(
        lines=(_outcome(report.summary), _compared(len(norm), changes), looks),
        changed=bool(changes),
    )


def _outcome(summary: Summary) -> str:
    if summary.refused is not None:
        return f"Refused: {short(summary.refused, REASON_CHARS)}"
    failed = f"{counted(summary.faulty_rows, 'row')} failed"
    if summary.faulty_rows:
        failed += f" ({summary.faulty_rows / max(1, summary.rows):.1%})"
    parts = [f"Published: {counted(summary.rows, 'row')}", failed]
    for step in summary.steps:
        if step.abstained:
            share = step.abstained / max(1, step.answers - step.failed - step.not_asked)
            rows = counted(step.abstained, "row")
            parts.append(f"{step.name} abstained from {rows} ({share:.1%})")
    if summary.unusable:
        parts.append(f"{counted(len(summary.unusable), 'file or fragment')} left out")
    if summary.audits:
        parts.append(f"{counted(len(summary.audits), 'audit')} passed")
    else:
        parts.append("no audit is set")
    if changed := [each for each in summary.measured if each.change is not None]:
        parts.append(f"{counted(len(changed), 'changed step')} measured and passed")
    return f"{', '.join(parts)}."


def _compared(runs: int, changes: Sequence[str]) -> str:
    if not runs:
        return "No earlier run was published with these steps, so there is nothing to compare with."
    against = f"Compared with {counted(runs, 'earlier run')}"
    if not changes:
        return f"{against}, labels, failures, lengths, confidence and speed are as usual."
    return f"{against}: {'; '.join(changes)}."


def _changes(now: PastStep, past: Sequence[PastStep]) -> Iterator[str]:
    """What stands out in a step, against the same step in earlier runs."""
    yield from _shift(now, past)
    middle, allowed = usual([step.failed for step in past], FAILED)
    if abs(now.failed - middle) > allowed:
        yield f"{now.failed:.1%} of the rows failed, usually {middle:.1%}"
    for name, what, floor, form in (
        ("prompt_tokens", "tokens in a prompt", LENGTH, ".0f"),
        ("answer_tokens", "tokens in an answer", LENGTH, ".0f"),
        ("confidence", "as the mean score", None, ".2f"),
        ("rows_per_second", "rows/s", SPEED, ".3g"),
    ):
        value = getattr(now, name)
        values = [number for step in past if (number := getattr(step, name)) is not None]
        if value is None or not values:
            continue
        middle, allowed = usual(values, CONFIDENCE)
        if floor is not None:
            middle, allowed = usual(values, floor * usual(values, 0.0)[0])
        if abs(value - middle) > allowed:
            yield f"{value:{form}} {what}, usually {middle:{form}}"


def _shift(now: PastStep, past: Sequence[PastStep]) -> Iterator[str]:
    """Whether the label shares moved, and the label that moved most."""
    before = total(map(_labels, past))
    labels = _labels(now)
    rows, rows_before = sum(labels.values()), sum(before.values())
    if not rows or not rows_before:
        return
    shift = population_stability(before, labels)
    names = before.keys() | labels.keys()
    # Few rows shift by chance: this is three times the expected index of equal shares.
    chance = 3 * (len(names) - 1) * (1 / rows + 1 / rows_before)
    if shift <= max(SHIFT, chance):
        return

    def moved(name: str) -> float:
        return abs(labels.get(name, 0) / rows - before.get(name, 0) / rows_before)

    most = max(sorted(names), key=moved)
    shares = f"{labels.get(most, 0) / rows:.0%}, usually {before.get(most, 0) / rows_before:.0%}"
    yield f"label shift {shift:.2f}, {short(most or 'no label', 40)} {shares}"


def _labels(step: PastStep) -> dict[str, int]:
    return with_unlabelled(step.labels, step.without_label)


def _places(report: Report) -> Iterator[str]:
    """What to look at, the most urgent first."""
    summary = report.summary
    if summary.silently_changed:
        number = counted(len(summary.silently_changed), "source")
        yield f"{number} with other bytes under the same size and times: check the disk"
    if summary.unusable:
        yield f"the files left out: {short(summary.unusable[0].reason, 120)}"
    errors = [line for line in errors_by_reason(summary) if line[1] != "unusable_file"]
    if errors:
        step, reason, rows = max(errors, key=lambda line: line[2])
        yield f"{counted(rows, 'row')} that failed in {step} with {reason}"
    for measures in report.measures:
        if measures.odd_fragments:
            odd = measures.odd_fragments[0]
            yield (
                f"{odd.fragment}, {odd.share:.0%} {short(odd.what, 40)} in {measures.step} where "
                f"all fragments together have {odd.usual:.0%}"
            )
            break
    for measures in report.measures:
        if measures.oddest:
            yield f"the oddest answers of {measures.step}, below"
            break
