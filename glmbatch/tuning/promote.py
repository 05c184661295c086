"""Decides whether a run replaces the current one, and switches to it. Loads no model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from glmbatch.errors import some_of
from glmbatch.store.files import writable
from glmbatch.tuning.report import CURRENT, RUNS, Report
from glmbatch.tuning.scores import Scores, SelectionScores, score, score_arrays


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
        elif isinstance(report.scores, SelectionScores):
            always, floor = _best_for_all(report.scores, metric)
            reason += f"; always answering {some_of(always)} would score {floor:.4f}"
        return new > floor, f"{reason}; no checkpoint was promoted before"
    if isinstance(report.current, Scores | SelectionScores):
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


def _best_for_all(scores: SelectionScores, metric: str) -> tuple[list[str], float]:
    """The same labels for all rows that score best, and their score."""
    labels = sorted(scores.labels, key=lambda label: -scores.labels[label].rows)
    # Which rows have a label does not matter to answers that are the same for all.
    rows = np.arange(scores.rows)[:, None]
    truth_RL = rows < np.array([scores.labels[label].rows for label in labels])
    best: tuple[list[str], float] = ([], 0.0)
    for count in range(1, len(labels) + 1):  # the most frequent ones, whatever their number
        guess_RL = np.broadcast_to(np.arange(len(labels)) < count, truth_RL.shape)
        measured = getattr(score_arrays(truth_RL, guess_RL), metric)
        if measured > best[1]:
            best = (labels[:count], measured)
    return best
