"""A contestant's process: start it, have it do its whole work in each round, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from environments import NotHere, last_line


class Worker:
    """A running contestant. Its standard error goes to `log`.

    Raises NotHere with the reason from the log if the process ends before it answers.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._timer: threading.Timer | None = None
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                # A group of its own: processes that the contestant started end with it.
                start_new_session=True,
            )

    def kill_after(self, seconds: float) -> None:
        """Kill the process when so many seconds have passed."""
        self._timer = threading.Timer(seconds, self._kill)
        self._timer.daemon = True
        self._timer.start()

    def wait_until_ready(self) -> str:
        """Wait until it has loaded; return its name and versions."""
        return str(self._answer()["version"])

    def run(self) -> dict[str, Any]:
        """Do the whole work once; return seconds, memory and answers."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:  # it ended after its last answer
            raise self._ended() from error
        return self._answer()

    def stop(self) -> None:
        """Kill the process."""
        # No graceful stop: there is nothing to save, and some libraries hang in their shutdown.
        if self._timer is not None:
            self._timer.cancel()
        self._kill()
        self._process.communicate()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, signal.SIGKILL)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> NotHere:
        code = self._process.wait()
        if code == -signal.SIGKILL and self._timer is not None:
            return NotHere("it did not end within the time limit")
        return NotHere(
            f"it ended with exit code {code}: {last_line(self._log.read_text(errors='replace'))}"
        )
