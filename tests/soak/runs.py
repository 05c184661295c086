"""Start runs in processes of their own, kill them, and count what they asked the model.

A kill is SIGKILL, at a change of a name on disk, at a prompt, or after some time. The counts are in
a file that the process maps, so they outlive it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from glmbatch.ledger.manifest import MANIFEST
from tests.support import ROOT

# A run that takes longer hangs.
MOST_SECONDS = 300
# What a run imports, also while it works.
IMPORTED = (
    "boto3",
    "deltalake",
    "glmbatch.glm.checkpoint.load",
    "glmbatch.glm.engine.worker",
    "glmbatch.glm.model.decode_kernel",
    "glmbatch.glm.tokenizer",
    "glmbatch.run.job",
    "numba.core.typing.cffi_utils",
    "numba.np.arraymath",
    "obstore",
    "pandas",
    "psutil",
    "pygal",
    "pyiceberg.catalog.sql",
    "pyiceberg.io.pyarrow",
)
# What an exit code of `glmbatch run` says.
ENDS = {0: "published", 3: "published"}


@dataclass(frozen=True)
class Kill:
    """When to kill a run: before or after its n-th change of a name, at its n-th prompt, or later.

    `at` is a number of names or prompts, from 1, or seconds. With `publishing`, names and seconds
    count from the first change that readers see.
    """

    kind: Literal["before name", "after name", "prompt", "time"]
    at: float
    publishing: bool = False

    @property
    def name(self) -> str:
        return self.kind


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "published", "killed", or the kind and text of its error; and its counts.

    It `asked` so many prompts and changed so many `names`. Readers see the changes from `shown`
    on, and with `complete` the publication is; both are 0 without one.
    """

    end: str
    asked: int
    names: int
    shown: int
    complete: int
    seconds: float
    message: str = ""


class Runs(Protocol):
    """Starts runs, and returns when they have ended."""

    in_flight: int
    grain_seconds: float

    def run(self, job: dict[str, Any], kill: Kill | None = None) -> Outcome: ...


class Counters:
    """The counts of an Outcome, in their order, and the process's number, in a mapped file."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(40))
        with path.open("r+b") as file:
            self.counts = memoryview(mmap.mmap(file.fileno(), 40)).cast("Q")

    def of_run(self) -> list[int]:
        """The counts of an Outcome alone."""
        return list(self.counts[:4])


def die() -> None:
    """Kill this process and those that it started."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def watch(order: dict[str, Any], counters: Counters) -> None:
    """Count from now on what this process asks and renames, and let it die where `order` says."""
    from glmbatch.glm.engine.worker import TorchEngine
    from glmbatch.store import files
    from glmbatch.store.locks import StoreLock

    kill = Kill(**order["kill"]) if order["kill"] else None
    files.TICK_NS = int(order["grain_seconds"] * 1e9)
    if order.get("lock_seconds"):
        StoreLock.__init__.__defaults__ = (order["lock_seconds"] / 5, order["lock_seconds"], None)
    output = Path(order["output"])
    for name in ("replace", "unlink", "rename"):
        call = getattr(os, name)
        setattr(os, name, _naming(call, output, counters.counts, kill))
    for owner, name in _commits(order["job"]["data"].get("format")):
        call = getattr(owner, name)
        setattr(owner, name, _naming(call, output, counters.counts, kill, output / name))
    for name in ("classify", "generate"):
        setattr(TorchEngine, name, _asking(getattr(TorchEngine, name), counters.counts, kill))


def _commits(table: str | None) -> list[tuple[Any, str]]:
    """The calls that commit to a table of this format. They change names without Python's `os`."""
    if table == "delta":
        from deltalake import DeltaTable, transaction

        return [
            (DeltaTable, "create_write_transaction"),
            (transaction, "create_table_with_add_actions"),
        ]
    if table == "iceberg":
        from pyiceberg.catalog.sql import SqlCatalog

        return [(SqlCatalog, "commit_table")]
    return []


def _naming(
    call: Callable[..., Any],
    output: Path,
    counts: memoryview,
    kill: Kill | None,
    changed: Path | None = None,
) -> Callable[..., Any]:
    """`call`, counted as a change of the path `changed`, else of the one in its arguments."""

    def counted(*arguments: Any, **options: Any) -> Any:
        path = changed or Path(arguments[-1])
        if not path.is_relative_to(output):
            return call(*arguments, **options)
        counts[1] += 1
        if not counts[2] and "_glmbatch" not in path.parts:
            counts[2] = counts[1]
        if path.name == MANIFEST:
            counts[3] = counts[1]
        since = counts[2] - 1 if counts[2] else counts[1]
        number = counts[1] - since if kill is not None and kill.publishing else counts[1]
        dies = kill.kind if kill is not None and kill.at == number else None
        if dies == "before name":
            die()
        try:
            return call(*arguments, **options)
        finally:
            if dies == "after name":
                die()

    return counted


def _asking(call: Callable[..., Any], counts: memoryview, kill: Kill | None) -> Callable[..., Any]:
    def counted(requests: Any) -> Iterator[Any]:
        for request in requests:
            counts[0] += 1
            if kill is not None and kill.kind == "prompt" and kill.at == counts[0]:
                die()
            yield request

    return lambda engine, requests: call(engine, counted(requests))


class Forks:
    """Runs in forks of one process that has imported everything.

    They are runs of `run_job`, or with the `environment` of a Prefect server of `glmbatch run`.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.counters = folder / "counters"
        self.grain_seconds = 2.0
        self.lock_seconds = 0.0  # after which a lock in a store is stale; 0: as users have it
        self.in_flight = 1 if environment is None else 2
        self._command = None if environment is None else str(folder / "job.yaml")
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.runs", *(["flows"] if environment else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )

    def run(self, job: dict[str, Any], kill: Kill | None = None) -> Outcome:
        """Run `job` until it ends or is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {
            "job": job,
            "output": job["data"]["output"],
            "kill": asdict(kill) if kill is not None else None,
            "counters": str(self.counters),
            "grain_seconds": self.grain_seconds,
            "lock_seconds": self.lock_seconds,
            "command": self._command,
        }
        if self._command:
            Path(self._command).write_text(yaml.safe_dump(job))
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate("")
        self._log.close()


class Flows:
    """Runs of `glmbatch run` under a Prefect server."""

    in_flight = 2

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.grain_seconds = 2.0
        self.environment = environment

    def run(self, job: dict[str, Any], kill: Kill | None = None) -> Outcome:
        """Run `job` until it ends or is killed."""
        (self.folder / "job.yaml").write_text(yaml.safe_dump(job))
        order = {
            "command": str(self.folder / "job.yaml"),
            "job": job,
            "output": job["data"]["output"],
            "kill": asdict(kill) if kill is not None else None,
            "counters": str(self.folder / "counters"),
            "grain_seconds": self.grain_seconds,
        }
        (self.folder / "counters").unlink(missing_ok=True)
        counters = Counters(self.folder / "counters")
        began = time.monotonic()
        with (self.folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.runs", json.dumps(order)],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
            try:
                process.wait(kill.at if kill is not None and kill.kind == "time" else 300)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        ends = {**ENDS, -signal.SIGKILL: "killed"}
        end = ends.get(process.returncode, "refused")
        message = (self.folder / "log").read_text()[-2000:]
        return Outcome(end, *counters.of_run(), time.monotonic() - began, message)


def _fork(order: dict[str, Any]) -> Outcome:
    path = Path(order["counters"])
    path.unlink(missing_ok=True)
    counters = Counters(path)
    kill = order["kill"]
    read, write = os.pipe()
    began = time.monotonic()
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        faulthandler.register(signal.SIGUSR1)
        counters.counts[4] = os.getpid()
        os.dup2(2, 1)  # what is printed must not reach the pipe of the answers
        os.write(write, json.dumps(_run(order, counters)).encode())
        os._exit(0)
    os.close(write)
    with suppress(OSError):  # the process may have done so itself, or have ended
        os.setpgid(process, process)
    timed = kill if kill and kill["kind"] == "time" else None
    since = 0.0 if timed and timed["publishing"] else began
    seconds = timed["at"] if timed else MOST_SECONDS
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if not since and counters.counts[2]:
            since = time.monotonic()
        now = time.monotonic()
        if (since and now - since > seconds) or now - began > MOST_SECONDS:
            if now - began > MOST_SECONDS:
                os.kill(process, signal.SIGUSR1)  # the log gets the stacks of all threads
                time.sleep(1)
            os.killpg(process, signal.SIGKILL)
            ended = os.waitpid(process, 0)
            break
        time.sleep(0.0005 if timed and timed["publishing"] else 0.005)
    status = ended[1]
    lasted = time.monotonic() - began
    with os.fdopen(read) as answer:
        text = answer.read()
    if lasted > MOST_SECONDS:
        end, message = "hung", ""
    elif text:
        end, message = json.loads(text)
    else:
        end = "killed" if os.WIFSIGNALED(status) else f"exit {os.waitstatus_to_exitcode(status)}"
        message = ""
    return Outcome(end, *counters.of_run(), lasted, message)


def _run(order: dict[str, Any], counters: Counters) -> tuple[str, str]:
    from glmbatch.run.job import run_job
    from glmbatch.settings.job import JobConfig

    watch(order, counters)
    if order["command"]:
        from glmbatch.cli.main import main

        log = Path(order["command"]).with_suffix(".log")
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = main(["run", order["command"]])
        sys.stdout.flush()
        return ENDS.get(code, f"exit {code}"), log.read_text()[-2000:]
    try:
        run_job(JobConfig.model_validate(order["job"]))
    except Exception as error:  # noqa: BLE001 - the caller compares it with the twin's
        return type(error).__name__, str(error)[:2000]
    return "published", ""


def _serve(*, prefect: bool) -> None:
    # Once, before the processes are forked.
    for name in (*IMPORTED, *["flows.annotate"] * prefect):
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(asdict(_fork(json.loads(line)))), flush=True)  # noqa: T201


def _run_flow(order: dict[str, Any]) -> None:
    from glmbatch.cli.main import main

    watch(order, Counters(Path(order["counters"])))
    sys.exit(main(["run", order["command"]]))


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["flows"]):
        _serve(prefect=bool(sys.argv[1:]))
    else:
        _run_flow(json.loads(sys.argv[1]))
