"""Shows how far a run is: a bar on a terminal, key=value lines elsewhere. Writes to stderr only."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from glmbatch.report.progress import Snapshot
from glmbatch.run.session import newest_progress

# A log of one night then has about a thousand lines.
LINE_SECONDS = 30.0
BAR_SECONDS = 0.2


@contextmanager
def showing_progress() -> Iterator[None]:
    """Show the progress of this process on stderr until the block ends."""
    ended = threading.Event()
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    shower = threading.Thread(
        target=_bar if terminal else _lines, args=(ended,), name="progress", daemon=True
    )
    shower.start()
    try:
        yield
    finally:
        ended.set()
        shower.join()


def _lines(ended: threading.Event) -> None:
    while not ended.wait(LINE_SECONDS):
        print(describe_progress(newest_progress()), file=sys.stderr, flush=True)


def describe_progress(progress: Snapshot) -> str:
    """One key=value line, for logs that machines read; answers are rows times steps."""
    rate = progress.per_second
    # Too high where the rest is known already: only the model finds that out, row by row.
    remaining = f"{(progress.total - progress.done) / rate:.0f}" if rate else "unknown"
    return (
        f"stage={progress.stage} answers={progress.done}/{progress.total} "
        f"computed={progress.computed} answers_per_second={rate:.1f} seconds_left={remaining}"
    )


def _bar(ended: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers, {task.fields[rate]:.0f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, rate=0.0)
        while not ended.wait(BAR_SECONDS):
            progress = newest_progress()
            bar.update(
                task,
                description=progress.stage,
                # None shows a bar that only moves: the number of answers is not known yet.
                total=progress.total or None,
                completed=progress.done,
                rate=progress.per_second,
            )
