"""A call over a table shows a bar on a terminal or in a notebook, and nothing elsewhere."""

from __future__ import annotations

import io
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from glmbatch.report import display
from glmbatch.run.session import newest_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(display, "BAR_SECONDS", 0.01)
    monkeypatch.setenv("TERM", "xterm")


def shown_on(stderr: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stderr)
    with display.showing_bar(newest_progress):
        time.sleep(0.3)
    return stderr.getvalue() if stderr else ""


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "answers" in shown_on(Terminal(), monkeypatch)


@pytest.mark.parametrize("stderr", [io.StringIO(), None])
def test_a_log_or_no_stderr_shows_no_bar(stderr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_on(stderr, monkeypatch) == ""


def test_a_dumb_terminal_or_short_call_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "PATIENCE_SECONDS", 60.0)
    assert shown_on(Terminal(), monkeypatch) == ""
    monkeypatch.setattr(display, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "dumb")
    assert shown_on(Terminal(), monkeypatch) == ""


def test_a_notebook_updates_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def show(content: dict[str, str], **_: object) -> Any:
        lines.append(content["text/plain"])
        return SimpleNamespace(update=show)

    notebook = ModuleType("IPython")
    notebook.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    shown = ModuleType("IPython.display")
    shown.display = show  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    shown_on(io.StringIO(), monkeypatch)
    assert "0/0 answers" in lines[1] and lines[-1] == ""


def test_concurrent_calls_show_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with display.showing_bar(newest_progress), display.showing_bar(newest_progress):
        bars = [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert len(bars) == 1
