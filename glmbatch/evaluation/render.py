"""The numbers of an evaluation or a comparison as a few aligned lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import yaml

from glmbatch.errors import counted, shown, some_of
from glmbatch.evaluation.confidence.calibrate import AS_IT_IS
from glmbatch.evaluation.results import (
    Comparison,
    Cost,
    Counts,
    Coverage,
    DifferingAnswer,
    Evaluation,
    LabelResult,
    NumberPair,
    Part,
    Result,
    SeveralResult,
    StepComparison,
    StepResult,
)
from glmbatch.report.counts import learned_of
from glmbatch.report.summary import short

# What each number is called, in the order in which they are shown.
NAMES = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "mean_absolute_error": "mean abs. error",
    "micro_precision": "micro precision",
    "micro_recall": "micro recall",
    "micro_f1": "micro-F1",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1 of items",
    "macro_f1": "macro-F1",
    "rouge_l": "ROUGE-L",
    "rouge_l_words": "ROUGE-L, words",
    "chrf": "chrF",
    "ece": "ECE",
}
WIDTH = max(map(len, NAMES.values()))
MOST_LABELS = 20
SUREST = 0.999999  # hardly any label is as probable; 1 is none for a setting
MOST_CONFUSED = 5
MOST_DIFFERENCES = 5
MOST_CHARACTERS = 80


def describe(evaluation: Evaluation) -> str:
    """The evaluation as text for a terminal."""
    lines: list[str] = []
    for step in evaluation.steps:
        lines += [*_step(step), ""]
    if evaluation.left_out:
        lines.append(f"not asked, since no row has their truth: {', '.join(evaluation.left_out)}")
    lines.append(f"answers kept in {evaluation.kept}")
    if evaluation.calibrated is not None:
        lines.append(f"calibration in {evaluation.calibrated}: name it as the job's calibration")
    return "\n".join(lines)


def describe_comparison(found: Comparison) -> str:
    """The comparison as text for a terminal, with a few of the answers that differ."""
    lines: list[str] = []
    for step in found.steps:
        names = ", ".join(dict.fromkeys(step.truth.values()))
        lines.append(step.step + (f", compared with column {names}" if names else ""))
        if step.note is not None:
            lines.append(_line("left out", step.note))
        for name, part in step.parts.items():
            if name != step.step:
                lines.append(f"  {name}")
            lines += _part(part, found.rows)
        for job, learned in zip("AB", step.learned, strict=True):
            if learned:
                lines.append(_line(f"{job} learned", learned_of(learned, found.rows)))
        for job, cost in (("A", step.a), ("B", step.b)):
            lines.append(_line(f"{job} asked", _cost(cost)))
        lines += [*_differences(step, found.differences), ""]
    for job, steps in (("A", found.only_in_a), ("B", found.only_in_b)):
        if steps:
            lines.append(f"only {job} has: {', '.join(steps)}")
    lines.append(f"answers kept in {found.kept}")
    return "\n".join(lines)


def _part(part: Part, rows: int) -> Iterator[str]:
    alone = [f"{part.only_a:,} by A alone"] if part.only_a else []
    alone += [f"{part.only_b:,} by B alone"] if part.only_b else []
    both = f"{part.moved.rows:,} of {rows:,} answered by both"
    yield _line("rows", "; ".join([both, *alone]))
    if not part.moved.differ:
        yield _line("moved", "none")
        return
    paired = part.paired
    if paired is not None:
        for name, title in NAMES.items():
            if name in paired.numbers:
                yield _line(title, _pair(paired.numbers[name], 2 if name == "chrf" else 4))
        alone = [f"{paired.only_a:,} with A alone", f"{paired.only_b:,} with B alone"]
        yield _line("right", f"{', '.join(alone)}; McNemar p {paired.p:.2g}")
    yield _line("moved", f"{counted(part.moved.differ, 'row')} ({part.moved.share:.1%})")
    if part.moved.labels:
        table = [["label", "A", "B", "moved"]]
        for label, moves in list(part.moved.labels.items())[:MOST_LABELS]:
            table.append([label, f"{moves.a:,}", f"{moves.b:,}", f"{moves.moved:.1%}"])
        yield from _table(table)


def _pair(numbers: NumberPair, digits: int) -> str:
    values = f"{numbers.a:.{digits}f} -> {numbers.b:.{digits}f}  {numbers.difference:+.{digits}f}"
    if numbers.interval is None or numbers.p is None:
        return values
    low, high = numbers.interval
    return f"{values}   95 %: {low:+.{digits}f} to {high:+.{digits}f}   p {numbers.p:.2g}"


def _cost(cost: Cost) -> str:
    tokens = f"{cost.prompt_tokens:,} prompt and {cost.completion_tokens:,} answer tokens"
    asked = f"{counted(cost.prompts, 'prompt')}, {tokens}, {cost.seconds:.1f} s"
    return f"{asked}; now {counted(cost.tokens_now, 'token')}"


def _differences(step: StepComparison, every: Sequence[DifferingAnswer]) -> Iterator[str]:
    """A few rows whose answers differ: those that became wrong first, then those that got right."""
    own = [row for row in every if row.part.partition(".")[0] == step.step]
    for number, row in enumerate(sorted(own, key=_weight)[:MOST_DIFFERENCES]):
        field = f", {row.part.partition('.')[2]}" if "." in row.part else ""
        text = "" if row.text is None else f": {_short(row.text)}"
        yield _line("" if number else "differ", f"row {row.row}{field}{text}")
        truth = "" if row.right_a is None else f", truth {_short(row.truth)}"
        yield _line("", f"  A {_answer(row.a)}, B {_answer(row.b)}{truth}")
    if len(own) > MOST_DIFFERENCES:
        yield _line("", f"{len(own) - MOST_DIFFERENCES:,} more: see --differences or --json")


def _answer(value: object) -> str:
    return "without an answer" if value is None else _short(value)


def _weight(row: DifferingAnswer) -> tuple[int, int]:
    order = {(True, False): 0, (False, True): 1, (False, False): 2}
    return order.get((bool(row.right_a), bool(row.right_b)), 3), row.row


def _short(value: object) -> str:
    return shown(short(value, MOST_CHARACTERS))


def _step(step: StepResult) -> Iterator[str]:
    names = ", ".join(dict.fromkeys(step.truth.values()))
    yield f"{step.step}" + (f", compared with column {names}" if names else "")
    yield _line("rows", _rows(step.counts))
    if step.learned:
        yield _line("learned", learned_of(step.learned, step.counts.scored))
    if step.note is not None:
        yield _line("not scored", step.note)
    if step.exact_match is not None:
        yield _line("all right", f"{step.exact_match:.4f}")
    for name in dict.fromkeys([*step.results, *step.without_truth, *step.abstained]):
        if name != step.step:
            others = {"without truth": step.without_truth, "abstained": step.abstained}
            parts = [f"{rows[name]:,} {what}" for what, rows in others.items() if name in rows]
            yield f"  {name}" + (f" (rows left out: {', '.join(parts)})" if parts else "")
        if name in step.results:
            yield from _result(step.results[name])
    yield from _calibration(step)
    tokens = f"{step.prompt_tokens:,} prompt and {step.completion_tokens:,} answer tokens"
    asked = f"{counted(step.computed, 'prompt')}, {tokens}"
    yield _line("asked now", asked if step.computed else "none")


def _line(name: str, value: str) -> str:
    return f"  {name:<{WIDTH}}  {value}"


def _rows(counts: Counts) -> str:
    others = {
        "without truth": counts.without_truth,
        "not asked": counts.not_asked,
        "abstained": counts.abstained,
        "failed": sum(counts.failed.values()),
    }
    parts = [f"{number:,} {name}" for name, number in others.items() if number]
    if counts.failed:
        parts[-1] += f" ({_counts(counts.failed)})"
    left_out = f"; left out: {', '.join(parts)}" if parts else ""
    return f"{counts.scored:,} of {counts.rows:,} scored{left_out}"


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())


def _result(result: Result) -> Iterator[str]:
    """The numbers with their intervals, then the labels."""
    for name, title in NAMES.items():
        value = getattr(result, name, None)
        if value is None:
            continue
        digits = 2 if name == "chrf" else 4
        interval = ""
        if name in result.intervals:
            low, high = result.intervals[name]
            interval = f"   95 %: {low:.{digits}f} to {high:.{digits}f}"
        yield _line(title, f"{value:.{digits}f}{interval}")
    if not isinstance(result, SeveralResult):
        yield from _coverage(result.coverage)
    if isinstance(result, LabelResult | SeveralResult):
        yield from _coverage_by_label(result)
        yield from _labels(result)
        if result.unknown_truths:
            unknown = sorted(result.unknown_truths.items(), key=lambda pair: (-pair[1], pair[0]))
            parts = [f"{name!r}: {counted(rows, 'row')}" for name, rows in unknown]
            yield _line("no such label", ", ".join(parts))
    if isinstance(result, LabelResult):
        yield from _confused(result)


def _coverage(coverage: Sequence[Coverage]) -> Iterator[str]:
    for covered in coverage:
        title = f"precision {covered.precision:g}"
        if covered.threshold is None:
            yield _line(title, "no abstain_below is sure to reach it with so few rows, or at all")
        else:
            share = f"{covered.covered:.1%} of the rows"
            yield _line(title, f"abstain_below: {_cut(covered.threshold):.6f} leaves {share}")


def _coverage_by_label(result: LabelResult | SeveralResult) -> Iterator[str]:
    """The setting that holds each label to a precision, as a job file takes it."""
    setting = "abstain_below" if isinstance(result, LabelResult) else "threshold"
    for number, first in enumerate(next(iter(result.by_label.values()), ())):
        of_label = {label: found[number] for label, found in result.by_label.items()}
        given = {}
        for label, covered in of_label.items():
            given[label] = SUREST if covered.threshold is None else _cut(covered.threshold)
        unsure = [label for label, covered in of_label.items() if covered.threshold is None]
        title = "" if number else "by label"
        if len(unsure) == len(given):
            yield _line(title, f"no {setting} is sure to hold any label to {first.precision:.0%}")
            continue
        block = yaml.safe_dump(
            given, default_flow_style=True, allow_unicode=True, sort_keys=False, width=math.inf
        )
        yield _line(title, f"{setting}: {block.strip()}")
        yield _line("", f"each right in {first.precision:.0%} of the rows that get it")
        if unsure:
            yield _line(
                "", f"{SUREST} as good as never: no threshold is sure for {some_of(unsure)}"
            )


def _cut(threshold: float) -> float:
    """A threshold to paste: cut and not rounded, so that the row at it is above it."""
    return min(max(math.floor(threshold * 1e6) / 1e6, 1e-6), SUREST)


def _calibration(step: StepResult) -> Iterator[str]:
    """Each map with its errors, as before and after."""
    table = [["calibrated", "map", "texts", "ECE", "after", "log loss", "after"]]
    for name, fitted in list(step.calibration.items())[:MOST_LABELS]:
        errors = [fitted.ece_before, fitted.ece_after]
        errors += [fitted.log_loss_before, fitted.log_loss_after]
        numbers = [f"{error:.4f}" for error in errors]
        kind = "none" if fitted.map == AS_IT_IS else fitted.map.kind
        table.append([name, kind, f"{fitted.texts:,}", *numbers])
    if step.calibration:
        yield from _table(table)
    for name, texts in step.uncalibrated.items():
        yield _line("not calibrated", f"{name}: {texts:,} texts are too few; see --calibrate")


def _labels(result: LabelResult | SeveralResult) -> Iterator[str]:
    table = [["label", "precision", "recall", "F1", "rows"]]
    for label, scores in list(result.labels.items())[:MOST_LABELS]:
        numbers = [f"{number:.4f}" for number in (scores.precision, scores.recall, scores.f1)]
        table.append([label, *numbers, f"{scores.rows:,}"])
    yield from _table(table)
    if len(result.labels) > MOST_LABELS:
        yield f"  {len(result.labels) - MOST_LABELS} more labels: see --json"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], WIDTH)
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        yield f"  {first:<{widths[0]}}  {'  '.join(cells)}"


def _confused(result: LabelResult) -> Iterator[str]:
    pairs = []
    for truth, answers in result.confusion.items():
        pairs += [(rows, truth, answer) for answer, rows in answers.items() if answer != truth]
    most = sorted((pair for pair in pairs if pair[0]), key=lambda pair: (-pair[0], pair[1:]))
    for number, (rows, truth, answer) in enumerate(most[:MOST_CONFUSED]):
        yield _line("" if number else "most confused", f"{truth} taken for {answer}: {rows:,}")
