"""Which run is the current one, and when another takes its place. Loads no model."""

from __future__ import annotations

import os
from pathlib import Path

from glmbatch.errors import some_of
from glmbatch.store.files import writable
from glmbatch.tuning.report import CURRENT, RUNS, Report
from glmbatch.tuning.scores import Scores, score


def current_run(output: str) -> Path | None:
    """The folder of the promoted run of `output`; None if there is none."""
    current = Path(output) / CURRENT
    return current.resolve() if current.exists() else None


def make_current(output: Path, run: str) -> None:
    """Point OUTPUT/current to the run of this name. A reader finds the old run or the new one."""
    # A link cannot be changed in place, but a rename replaces one at once.
    link = output / f".{CURRENT}"
    with writable(output / CURRENT):
        link.unlink(missing_ok=True)
        link.symlink_to(Path(RUNS) / run)
        os.replace(link, output / CURRENT)


def decide(report: Report, metric: str) -> tuple[bool, str]:
    """Whether the run is to be promoted, and why or why not; `metric` names a score of the report.

    It must beat the current checkpoint on the same rows and lack none of its labels. The first
    classifier must beat the most frequent label; the first generator must get anything right.
    """
    new = getattr(report.scores, metric)
    if report.current is None:
        reason = f"{metric} {new:.4f}"
        floor = 0.0
        if isinstance(report.scores, Scores):
            label, floor = _most_frequent(report.scores, metric)
            reason += f", always {label!r} would have {floor:.4f}"
        return new > floor, f"{reason}; nothing was promoted before"
    if isinstance(report.current, Scores):
        lacking = sorted(set(report.current.labels) - set(report.labels))
        if lacking:
            return False, (
                f"it lacks the labels {some_of(lacking)}, which the current checkpoint has. "
                "Set output to start over"
            )
    old = getattr(report.current, metric)
    reason = f"{metric} {new:.4f}, the current checkpoint has {old:.4f} on the same rows"
    if new > old:
        return True, reason
    return False, f"{reason}; it must be better"


def _most_frequent(scores: Scores, metric: str) -> tuple[str, float]:
    """The most frequent label of the rows, and the score of always giving it."""
    counts = {label: of_label.rows for label, of_label in scores.labels.items()}
    always = max(counts, key=counts.__getitem__)
    truth: list[str] = []
    for label, count in counts.items():
        truth += [label] * count
    return always, getattr(score(truth, [always] * len(truth), list(counts)), metric)
