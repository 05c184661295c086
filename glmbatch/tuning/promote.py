"""Decides whether a run replaces the current one, and switches to it. Loads no model."""

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
    """Point OUTPUT/current to the run of this name; readers see either the old or the new run."""
    # A link cannot be changed in place, but a rename replaces it atomically.
    link = output / f".{CURRENT}"
    with writable(output / CURRENT):
        link.unlink(missing_ok=True)
        link.symlink_to(Path(RUNS) / run)
        os.replace(link, output / CURRENT)


def decide(report: Report, metric: str) -> tuple[bool, str]:
    """Whether to promote the run, and the reason; `metric` names a score in the report.

    It must beat the current checkpoint on the same rows and have all of its labels. A first
    classifier must beat the most frequent label; a first generator must score above 0.
    """
    new = getattr(report.scores, metric)
    if report.current is None:
        reason = f"{metric} {new:.4f}"
        floor = 0.0
        if isinstance(report.scores, Scores):
            label, floor = _most_frequent(report.scores, metric)
            reason += f"; always answering {label!r} would score {floor:.4f}"
        return new > floor, f"{reason}; no checkpoint was promoted before"
    if isinstance(report.current, Scores):
        lacking = sorted(set(report.current.labels) - set(report.labels))
        if lacking:
            return False, (
                f"it lacks the labels {some_of(lacking)}, which the current checkpoint has. "
                "Set another output to start over"
            )
    old = getattr(report.current, metric)
    reason = f"{metric} {new:.4f}; the current checkpoint has {old:.4f} on the same rows"
    if new > old:
        return True, reason
    return False, f"{reason}, and the new one must score higher"


def _most_frequent(scores: Scores, metric: str) -> tuple[str, float]:
    """The most frequent label of the rows, and the score of always answering it."""
    counts = {label: of_label.rows for label, of_label in scores.labels.items()}
    always = max(counts, key=counts.__getitem__)
    truth: list[str] = []
    for label, count in counts.items():
        truth += [label] * count
    return always, getattr(score(truth, [always] * len(truth), list(counts)), metric)
