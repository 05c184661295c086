"""Decides whether a run replaces the current one, and switches to it. Loads no model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np

from glmbatch.errors import InputError, counted, some_of
from glmbatch.store.files import writable
from glmbatch.tuning.examples import text_keys
from glmbatch.tuning.report import CURRENT, LEARNED, REPORT, RUNS, Comparison, Report, read_report
from glmbatch.tuning.scores import Scores, SelectionScores
from glmbatch.tuning.split import Labelled

logger = logging.getLogger(__name__)


def current_run(output: str) -> Path | None:
    """The folder of the promoted run of `output`; None if there is none."""
    current = Path(output) / CURRENT
    return current.resolve() if current.exists() else None


def template_of_current(output: str) -> str | None:
    """The prompt of the promoted run of `output`; None if there is none."""
    current = current_run(output)
    report = None if current is None else read_report(current)
    return None if report is None else report.settings["prompt_template"]


def without_learned(
    labelled: Labelled, current: Path | None, template: str, source: str
) -> Labelled:
    """`labelled` without the test rows that the current checkpoint was trained on.

    They overlap if that checkpoint, which asks by `template`, had another seed, split or input.
    InputError if no row is left.
    """
    # Runs of early versions have no list of the texts they learned.
    if current is None or not (current / LEARNED).is_file():
        return labelled
    test = labelled.parts["test"]
    asked = [row.with_template(template) for row in test]
    learned = np.isin(text_keys(asked), np.load(current / LEARNED))
    new = [row for row, is_learned in zip(test, learned, strict=True) if not is_learned]
    if not new:
        raise InputError(
            f"{source}: {current} was trained on all test rows. Set data.seed to the value it had, "
            "or set another output."
        )
    if len(new) == len(test):
        return labelled
    warning = (
        f"{len(test) - len(new)} test rows were left out: "
        "the current checkpoint was trained on their texts"
    )
    audit = labelled.audit.model_copy(update={"warnings": (*labelled.audit.warnings, warning)})
    return Labelled({**labelled.parts, "test": new}, audit)


def make_current(output: Path, run: str) -> None:
    """Point OUTPUT/current to the run of this name; readers see either the old or the new run."""
    # A link cannot be changed in place, but a rename replaces it atomically.
    link = output / f".{CURRENT}"
    with writable(output / CURRENT, "output"):
        link.unlink(missing_ok=True)
        link.symlink_to(Path(RUNS) / run)
        os.replace(link, output / CURRENT)


def prune(output: Path, keep: int) -> None:
    """Delete all evaluated runs but the current one and the last `keep` others."""
    current = current_run(str(output))
    runs = []
    for folder in (output / RUNS).iterdir():
        # One without a report may still be trained.
        if folder.resolve() != current and (folder / REPORT).is_file():
            runs.append(folder)
    runs.sort(key=lambda run: (run / REPORT).stat().st_mtime_ns, reverse=True)
    for folder in runs[keep:]:
        with writable(folder, "output"):
            shutil.rmtree(folder)
        logger.info("%s: deleted (keep_runs)", folder)


def decide(report: Report, must_beat: Collection[str], least_rows: int) -> Report:
    """The report with the decision whether to promote the run, and its reason.

    Enough test rows must show that the run beats the best answer that is the same for all rows, and
    those of `must_beat`. It must have all labels of the current checkpoint.
    """
    compared = []
    for comparison in report.comparisons:
        needed = _is_needed(comparison, report, must_beat)
        compared.append(comparison.model_copy(update={"needed": needed}))
    metric = report.promoted_by
    reason = f"{metric} {getattr(report.scores, metric):.4f} on {report.scores.rows} test rows"
    refused = _refused(report, least_rows)
    unbeaten = [each.name for each in compared if each.needed and not each.test.is_better]
    beaten = [each.name for each in compared if each.test.is_better]
    if beaten:
        reason += f"; better than {' and '.join(beaten)}"
    if unbeaten:
        reason += f"; not surely better than {' and '.join(unbeaten)}, as it must be"
    reason += _advice(report, compared)
    if refused:
        reason += f"; {refused}"
    return report.model_copy(
        update={
            "comparisons": tuple(compared),
            "promoted": not (unbeaten or refused),
            "reason": reason,
        }
    )


def _advice(report: Report, compared: Collection[Comparison]) -> str:
    """That a job can use the baseline, if it is what the run had to beat and did not."""
    for each in compared:
        refused = each.rival == "baseline" and each.needed and not each.test.is_better
        if refused and report.baseline_model is not None:
            rows = counted(report.audit.parts["train"], "training row")
            better = "is the better choice" if each.test.difference < 0 else "is as good"
            return f"; TF-IDF {better} with {rows}: set model: {report.baseline_model}"
    return ""


def _is_needed(comparison: Comparison, report: Report, must_beat: Collection[str]) -> bool:
    """Whether the run must beat this one."""
    if comparison.rival != "baseline":
        return comparison.rival in {*must_beat, "constant"}
    constant = [each.test.other for each in report.comparisons if each.rival == "constant"]
    return comparison.rival in must_beat and comparison.test.other > max(constant, default=0.0)


def _refused(report: Report, least_rows: int) -> str:
    """Why the run cannot be promoted, whatever it beats; "" if it can."""
    if report.scores.rows < least_rows:
        return f"{least_rows} test rows are needed (least_test_rows)"
    if isinstance(report.current, Scores | SelectionScores):
        lacking = sorted(set(report.current.labels) - set(report.labels))
        if lacking:
            return (
                f"it lacks the labels {some_of(lacking)}, which the current checkpoint has. "
                "Set another output to start over"
            )
    if getattr(report.scores, report.promoted_by) <= 0:
        return "no answer is right"
    return ""
