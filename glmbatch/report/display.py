"""Shows the progress of a run: a bar on a terminal, key=value lines elsewhere. Writes to stderr.

A call over a table in memory shows only the bar, on a terminal or in a notebook. A thread polls the
caller for the newest counts.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from glmbatch.report.progress import Snapshot

# A run of eight hours then logs about a thousand lines.
LINE_SECONDS = 30.0
BAR_SECONDS = 0.2
# A short call ends before anyone could read a bar.
PATIENCE_SECONDS = 1.0
BAR_CELLS = 20
Newest = Callable[[], Snapshot]

# Two bars would overwrite each other, and both would show the newest run.
_SHOWING = threading.Lock()


@contextmanager
def showing_progress(newest: Newest) -> Iterator[None]:
    """Show the `newest` counts of this process on stderr until the block ends."""
    show = _bar if _on_terminal() else _lines
    with _shown_by(lambda ended: show(ended, newest)):
        yield


@contextmanager
def showing_bar(newest: Newest) -> Iterator[None]:
    """Show a bar until the block ends, if the caller has a terminal or a notebook."""
    bar = _bar if _on_terminal() else _cell if _in_notebook() else None
    if bar is None or not _SHOWING.acquire(blocking=False):
        yield
        return
    try:
        with _shown_by(lambda ended: ended.wait(PATIENCE_SECONDS) or bar(ended, newest)):
            yield
    finally:
        _SHOWING.release()


@contextmanager
def _shown_by(show: Callable[[threading.Event], object]) -> Iterator[None]:
    ended = threading.Event()
    shower = threading.Thread(target=show, args=(ended,), name="progress", daemon=True)
    shower.start()
    try:
        yield
    finally:
        ended.set()
        shower.join()


def _on_terminal() -> bool:
    # A program without a console has no stderr.
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _cell(ended: threading.Event, newest: Newest) -> None:
    """Show one line of text below a notebook's cell and update it in place, without widgets."""
    from IPython.display import display

    line = display({"text/plain": "starting"}, raw=True, display_id=True)
    while not ended.wait(BAR_SECONDS):
        progress = newest()
        filled = BAR_CELLS * progress.done // max(1, progress.total)
        bar = "█" * filled + "░" * (BAR_CELLS - filled)
        text = f"{progress.stage} {bar} {progress.done}/{progress.total} answers"
        line.update({"text/plain": f"{text}, {progress.per_second:.0f}/s"}, raw=True)
    line.update({"text/plain": ""}, raw=True)


def _lines(ended: threading.Event, newest: Newest) -> None:
    with suppress(OSError):  # such as a full disk, or a pipe whose reader has gone
        while not ended.wait(LINE_SECONDS):
            sys.stderr.write(f"{describe_progress(newest())}\n")
            sys.stderr.flush()


def describe_progress(progress: Snapshot) -> str:
    """One key=value line for machine-read logs. It counts answers, which are rows times steps."""
    rate = progress.per_second
    # An overestimate if many of the remaining answers are known: reuse is only found row by row.
    remaining = f"{(progress.total - progress.done) / rate:.0f}" if rate else "unknown"
    return (
        f"stage={progress.stage} {progress.unit}={progress.done}/{progress.total} "
        f"computed={progress.computed} {progress.unit}_per_second={rate:.1f} "
        f"seconds_left={remaining}{' ' if progress.note else ''}{progress.note}"
    )


def _rate(progress: Snapshot) -> str:
    digits = 0 if progress.unit == "answers" else 1
    return f"{progress.unit}, {progress.per_second:.{digits}f}/s {progress.note}".rstrip()


def _bar(ended: threading.Event, newest: Newest) -> None:
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
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, rate="")
        while not ended.wait(BAR_SECONDS):
            progress = newest()
            bar.update(
                task,
                description=progress.stage,
                # None shows a pulsing bar while the number of answers is unknown.
                total=progress.total or None,
                completed=progress.done,
                rate=_rate(progress),
            )
