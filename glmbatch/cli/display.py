"""Shows how far a run is: a bar on a terminal, plain key=value lines elsewhere. Writes to stderr only."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from glmbatch.report.progress import Snapshot
from glmbatch.run.session import newest_progress

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


def describe_progress(now: Snapshot) -> str:
    """One key=value line; answers are rows times steps."""
    rate = now.computed / now.seconds if now.seconds else 0.0
    left = f"{(now.total - now.done) / rate:.0f}" if rate else "unknown"
    return (
        f"stage={now.stage} answers={now.done}/{now.total} computed={now.computed} "
        f"answers_per_second={rate:.1f} seconds_left={left}"
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
            now = newest_progress()
            rate = now.computed / now.seconds if now.seconds else 0.0
            bar.update(
                task, description=now.stage, total=now.total or None, completed=now.done, rate=rate
            )
