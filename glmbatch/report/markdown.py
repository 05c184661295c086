"""The facts of a run as Markdown, for Prefect's page of the flow run. Shorter than the report."""

from __future__ import annotations

import re
from collections.abc import Sequence

from glmbatch.report.facts import Report, label_shares, outcome, run_facts
from glmbatch.report.summary import StepSummary


def markdown(report: Report) -> str:
    """The verdict, the facts and the label shares; all text is escaped, so none acts as markup."""
    lines = report.verdict.lines if report.verdict else [outcome(report.summary)]
    parts = [*map(_plain, lines), _table(["", ""], run_facts(report))]
    for step in report.summary.steps:
        if step.labels:
            parts.append(_labels(report, step))
    return "\n\n".join(parts)


def _labels(report: Report, step: StepSummary) -> str:
    """The label shares, next to those of the previous run if there is one."""
    head = [step.name, "share", f"in the previous run, {report.before}"]
    rows = []
    for share in label_shares(report, step):
        rows.append([share.label, f"{share.share:.1%}", f"{share.share_before:.1%}"])
    # Without a previous run, the last column would be all zeros.
    columns = 3 if report.labels_before.get(step.name) else 2
    return _table(head[:columns], [row[:columns] for row in rows])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_row(head), f"| {' | '.join(['---'] * len(head))} |"]
    lines += [_row(row) for row in rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """`text` on one line, with everything escaped that Markdown or HTML would interpret."""
    # All ASCII punctuation: Markdown allows a backslash before each, and HTML needs some escaped.
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))
