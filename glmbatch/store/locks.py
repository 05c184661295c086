"""The lock of an output: only one run at a time writes to it. Knows only its own files.

On this machine the lock is the system's `flock`, which is released whenever the process ends. A
store has no such lock. There, locks are numbered objects, OUTPUT/_glmbatch/lock.00000001, and the
one with the highest number is valid:

    take      create the object with the next number if it does not exist; only one process can
    keep      write the object again every 20 seconds
    lose      a higher number exists: another run took over after minutes without a renewal
    release   write that the lock is free; the object stays, so that no number is used twice

A process may stand still between its last look at the lock and its next request. So every request
that changes the output first passes a gate, which closes when the lock was not renewed for too
long; and the holder's guarded objects are written only over the version that it knows.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from pydantic_core import from_json

from glmbatch.errors import GlmbatchError, InputError, Interrupted, TransientError
from glmbatch.store.files import committed, real_path, writable
from glmbatch.store.objects import access
from glmbatch.store.paths import Address, AnyPath, ObjectPath, location

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 20.0
# Nine heartbeats, so that a live run does not lose its lock when the store is slow for a while.
STALE_SECONDS = 180.0
# The locks that this process holds, by path, each with its run.
_LOCKS: dict[str, tuple[str, FileLock | StoreLock]] = {}
_TAKING = threading.Lock()
# Identifies this process in a store: it recognizes its own lock if the response to a write is lost.
_TOKEN = uuid.uuid4().hex


def hold(path: AnyPath, run: str) -> bool:
    """Take the lock `path` for `run` until `release`; safe to repeat.

    Return whether an earlier holder may still be alive, which in a store did not release it.
    InputError when another run or process holds it, or when the output cannot be written.
    """
    name = _name(path)
    with _TAKING:
        holder = _LOCKS[name][0] if name in _LOCKS else run
        if holder != run:
            raise InputError(
                f"{path.parent.parent}: another run of this process is writing to it. Set "
                "data.output."
            )
        if name not in _LOCKS:
            lock = StoreLock(path, token=_TOKEN) if isinstance(path, ObjectPath) else FileLock(path)
            may_live = lock.take()
            _LOCKS[name] = run, lock
            return may_live
    return False


def _name(path: AnyPath) -> str:
    """One name for each lock, with links in the folder resolved but not in the lock itself."""
    return str(real_path(path.parent) / path.name)


def release(path: AnyPath, run: str) -> None:
    """Release the lock `path` if `run` holds it; safe to repeat."""
    name = _name(path)
    if name in _LOCKS and _LOCKS[name][0] == run:
        _LOCKS.pop(name)[1].let_go()
        if isinstance(path, ObjectPath):
            access.unguard(path.parent.parent)


def guard(paths: Iterable[AnyPath]) -> None:
    """Until `release`, write these files only over their present versions. Does nothing on a disk.

    The holder of an `flock` keeps it while it stands still, so nobody else writes meanwhile.
    """
    for path in paths:
        if isinstance(path, ObjectPath):
            access.guard(path)


def check_held(path: AnyPath) -> None:
    """Interrupted when this process has lost the lock `path`, or may have lost it.

    Does nothing if this process never took it.
    """
    held = _LOCKS.get(_name(path))
    if held is not None:
        held[1].check()


def read_sign(path: Address) -> str:
    """The text that the holder wrote to the lock `path`; empty in a store, which all machines see.

    OSError when the lock cannot be read.
    """
    place = location(path)
    return place.read_text(errors="replace") if isinstance(place, Path) else ""


def shows(path: Address, sign: str) -> bool:
    """Whether this machine reads `sign` in the lock `path`, as it does on a shared file system.

    True for an empty `sign`, as of a store.
    """
    try:
        return not sign or read_sign(path) == sign
    except OSError:
        return False


def seconds_until_free(path: Address) -> float:
    """The time in seconds for which the lock `path` stays taken after its process died.

    0 on this machine; in a store, until the lock is stale.
    """
    return 0 if isinstance(location(path), Path) else STALE_SECONDS + HEARTBEAT_SECONDS / 2


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Lock the file `path` against other processes, waiting until it is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _this_process() -> str:
    return f"process {os.getpid()} of {socket.gethostname()}"


class FileLock:
    """A lock on this machine, by `flock`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1

    def take(self) -> bool:
        """Take the lock; False: no earlier holder is alive.

        InputError when another process has it or the folder cannot be written.
        """
        with committed(self._path.with_name("writable")) as partial:
            partial.write_bytes(b"")
        with writable(self._path):
            self._path.with_name("writable").unlink(missing_ok=True)
            # Never through a link: its target may be any file.
            if self._path.is_symlink():
                self._path.unlink()
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                self._lock()
            except BaseException:
                os.close(self._handle)
                raise
        return False

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            sign = os.read(self._handle, 200).decode(errors="replace").strip("\0")
            holder = " ".join(sign.split()) or "another process"
            raise InputError(
                f"{self._path.parent.parent}: {holder} is writing to it. Wait until it ends, or "
                "set data.output."
            ) from error
        os.ftruncate(self._handle, 0)
        os.write(self._handle, _this_process().encode())

    def check(self) -> None:
        """Do nothing: a live process never loses an `flock`."""

    def let_go(self) -> None:
        """Release the lock; the end of the process does so too."""
        os.close(self._handle)


class StoreLock:
    """A lock in a store, renewed by a thread from `take` to `let_go`.

    The age of another process's renewal is measured only by the store's clock. A process that was
    suspended for too long detects it with `check`, which every publication calls first.
    """

    def __init__(
        self,
        path: ObjectPath,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        token: str | None = None,
    ) -> None:
        self._folder, self._name, self._output = path.parent, path.name, path.parent.parent
        self._heartbeat_seconds, self._stale_seconds = heartbeat_seconds, stale_seconds
        self._token = token or uuid.uuid4().hex
        self._number = 0
        self._heard = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="store lock", daemon=True)

    def take(self) -> bool:
        """Take the lock; return whether an earlier holder did not release it and may be alive.

        InputError when another run holds or takes it, or the store cannot be written.
        TransientError when it cannot be reached.
        """
        now, numbers = self._probe(), self._numbers()
        age = self._age(numbers[-1], now) if numbers else STALE_SECONDS
        if numbers and age <= self._stale_seconds:
            self._refuse(numbers[-1], age)
        self._number = numbers[-1] + 1 if numbers else 1
        # Decided by the content of the lock, not by the result of `create`: if the response to a
        # first attempt was lost, the object exists and is ours.
        self._heard = time.monotonic()
        with suppress(TransientError):  # it may have been written although the answer was lost
            self._path(self._number).create(self._content())
        numbers_now = self._numbers()
        if numbers_now[-1:] != [self._number] or self._read(self._number)["token"] != self._token:
            self._refuse(max(numbers_now, default=self._number), 0)
        for number in numbers_now[:-1]:
            self._path(number).unlink(missing_ok=True)
        access.GATES[self._output] = self._gate
        self._thread.start()
        return age != float("inf")

    def check(self) -> None:
        """Interrupted when another run took over, or may do so at any moment."""
        if self._is_silent() or self._numbers()[-1:] != [self._number]:
            self._interrupt()

    def _gate(self, path: PurePosixPath) -> None:
        """Interrupted if the lock was not renewed in time; the lock itself may be written."""
        is_lock = path.parent == self._folder and path.name.startswith(f"{self._name}.")
        if self._is_silent() and not is_lock:
            self._interrupt()

    def _is_silent(self) -> bool:
        return time.monotonic() - self._heard > self._stale_seconds

    def _interrupt(self) -> NoReturn:
        raise Interrupted(
            f"{self._output}: this run stopped writing: its lock was not renewed for "
            f"{self._stale_seconds:.0f} s, and another run may have taken over. Run again "
            "when that has ended."
        )

    def let_go(self) -> None:
        """Release the lock; if that fails, with a warning, it is free once it is stale."""
        self._ended.set()
        if access.GATES.get(self._output) == self._gate:
            del access.GATES[self._output]
        self._thread.join()
        try:
            self._write_sign(free=True)
        except GlmbatchError as error:
            logger.warning(
                "%s: stays locked for %.0f s: %s", self._output, self._stale_seconds, error
            )

    def _keep(self) -> None:
        while not self._ended.wait(self._heartbeat_seconds):
            try:
                self._write_sign()
            except GlmbatchError as error:
                # The next attempt may succeed; `check` knows the time since the last success.
                logger.warning("%s: the lock was not renewed: %s", self._output, error)

    def _write_sign(self, *, free: bool = False) -> None:
        began = time.monotonic()
        if self._numbers()[-1:] == [self._number]:
            self._path(self._number).write_bytes(self._content(free=free))
            self._heard = began

    def _probe(self) -> datetime:
        """The store's time. Checks that it can be written; warns if it ignores conditions."""
        path = self._folder / f"writable.{self._token}"
        with writable(self._output):
            path.create(b"")
            if path.create(b""):
                logger.warning(
                    "%s: the store ignores If-None-Match, so two runs that start at the same "
                    "moment may both get the lock. Start one at a time.",
                    self._output,
                )
            now = path.modified()
            path.unlink(missing_ok=True)
        return now

    def _age(self, number: int, now: datetime) -> float:
        """Seconds since lock `number` was last renewed; infinity if it was released or is ours."""
        try:
            sign = self._read(number)
            return (
                float("inf")
                if sign["free"] or sign["token"] == self._token
                else (now - self._path(number).modified()).total_seconds()
            )
        except FileNotFoundError:  # just replaced by a higher number
            return 0

    def _refuse(self, number: int, age: float) -> None:
        try:
            holder = self._read(number)["holder"]
        except FileNotFoundError:
            holder = "another process"
        raise InputError(
            f"{self._output}: {holder} is writing to it; it renewed its lock {max(age, 0):.0f} s "
            "ago. Wait until it ends, or set data.output. If it was killed, the lock is free "
            f"{self._stale_seconds:.0f} s after that."
        )

    def _numbers(self) -> list[int]:
        names = [path.name.rpartition(".")[2] for path in self._folder.glob(f"{self._name}.*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _path(self, number: int) -> ObjectPath:
        return self._folder / f"{self._name}.{number:08d}"

    def _read(self, number: int) -> dict[str, Any]:
        """The holder's text in lock `number`; defaults for a damaged one, which counts by age."""
        sign = {"holder": "another process", "token": "", "free": False}
        with suppress(ValueError):
            content = from_json(self._path(number).read_bytes())
            if isinstance(content, dict):
                sign |= content
        return sign

    def _content(self, *, free: bool = False) -> bytes:
        return json.dumps({"holder": _this_process(), "token": self._token, "free": free}).encode()
