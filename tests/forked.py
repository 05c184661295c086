"""Runs Python programs in forks of one process that has imported what most runs import.

That takes most of the CPU seconds of a small run. A fork has its own environment, output and exit
code, and can be killed, like any program. What a program imports, what libraries read from the
environment when they are imported, and the options of Python must be tested in a new Python.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from tests.support import ROOT

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.preloaded"])


class Program:
    """A started program in a session of its own, with what tests use of subprocess.Popen."""

    def __init__(self, environment: Mapping[str, str], arguments: tuple[str, ...], log: Path):
        everything = {**os.environ, **environment}
        task = (arguments, everything, str(log))
        # pytest ends daemons at its exit, and would wait for others, however long they take.
        self._process = _FORKS.Process(target=_become, args=task, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._log = log

    def output(self, number: int) -> str:
        """What it wrote to descriptor 1 or 2 so far."""
        return Path(f"{self._log}{number}").read_text()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), seconds or 0)
        return self._process.exitcode

    def kill(self) -> None:
        """Kill it alone, if it has not ended."""
        self._process.kill()


def start(environment: Mapping[str, str], *arguments: str, log: Path = Path(os.devnull)) -> Program:
    """Start `python ARGUMENTS`, whose output is dropped, or goes to files named after `log`."""
    return Program(environment, arguments, log)


def run(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end: `-m MODULE ...`, `-c CODE ...` or `FILE ...`."""
    with tempfile.TemporaryDirectory() as folder:
        program = start(environment, *arguments, log=Path(folder) / "log")
        try:
            code = program.wait(400)
        finally:
            if program.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(arguments, code, program.output(1), program.output(2))


def _become(arguments: tuple[str, ...], environment: Mapping[str, str], log: str) -> None:
    """Turn this fork into `python ARGUMENTS`, which writes to `log`1 and `log`2."""
    assert "tests.preloaded" in sys.modules, "its imports failed"
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        path = log if log == os.devnull else f"{log}{number}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    _read_prefect_settings(arguments)
    try:
        _execute(*arguments)
    finally:
        # What Python does at its end, and a fork of multiprocessing does not.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _read_prefect_settings(arguments: tuple[str, ...]) -> None:
    """Read Prefect's settings from the environment, as at the import of Prefect."""
    import prefect.context

    from glmbatch.cli.main import _set_prefect_defaults

    if "glmbatch.cli.main" in arguments:
        _set_prefect_defaults()
    prefect.context.refresh_global_settings_context()


def _execute(way: str, *arguments: str) -> None:
    if way == "-m":
        sys.argv = list(arguments)
        sys.modules.pop(arguments[0], None)  # runpy warns of a module that is imported already
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif way == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [way, *arguments]
        sys.path.insert(0, str(Path(way).parent))
        runpy.run_path(way, run_name="__main__")
