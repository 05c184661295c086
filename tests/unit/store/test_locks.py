"""In an object store one run at a time holds an output, whatever happens to the others."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from glmbatch.errors import InputError, Interrupted
from glmbatch.ledger.ledger import Ledger
from glmbatch.store.locks import StoreLock
from tests.stores import Request, Store
from tests.support import ROOT

NAME = "out/_glmbatch/lock"

# Takes the lock, renews it every 0.3 s, and says for each line of input whether it still has it.
HOLDER = """
import sys
from glmbatch.store.locks import StoreLock
from glmbatch.store.paths import location
from glmbatch.errors import Interrupted

lock = StoreLock(location(sys.argv[1]), heartbeat_seconds=0.3, stale_seconds=2)
lock.take()
print("held", flush=True)
for line in sys.stdin:
    try:
        lock.check()
        print("held", flush=True)
    except Interrupted as error:
        print(error, flush=True)
"""


def lock(store: Store) -> StoreLock:
    return StoreLock(store.path(NAME), heartbeat_seconds=0.3, stale_seconds=2)


def test_of_many_that_start_at_once_one_gets_the_lock(store: Store) -> None:
    locks = [lock(store) for _ in range(6)]

    def take(each: StoreLock) -> StoreLock | None:
        try:
            each.take()
        except InputError:
            return None
        return each

    with ThreadPoolExecutor(6) as pool:
        (holder,) = [each for each in pool.map(take, locks) if each]
    holder.check()
    with pytest.raises(InputError, match=r"process \d+ of .* is writing to it"):
        lock(store).take()
    holder.let_go()
    after = lock(store)
    after.take()
    after.let_go()
    assert len(store.names("out")) == 1


@pytest.mark.slow
def test_a_live_run_keeps_its_lock_a_stalled_one_loses_it(
    store: Store,
) -> None:
    command = [sys.executable, "-c", HOLDER, store.url(NAME)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def asked() -> str:
            other.stdin.write("?\n")
            other.stdin.flush()
            return str(other.stdout.readline())

        try:
            assert other.stdout.readline() == "held\n"
            time.sleep(3.2)  # longer than a lock lives without renewal
            with pytest.raises(
                InputError, match=rf"process {other.pid} of .*renewed its lock [0-2] s ago"
            ):
                lock(store).take()
            assert asked() == "held\n"
            other.send_signal(signal.SIGSTOP)
            with pytest.raises(InputError, match=rf"process {other.pid}"):
                lock(store).take()
            time.sleep(3.2)
            taken = lock(store)
            taken.take()
            other.send_signal(signal.SIGCONT)
            time.sleep(1)  # its next renewal must not take the lock back
            assert "another run may have taken over" in asked()
            taken.check()
            taken.let_go()
        finally:
            other.kill()


@pytest.mark.slow
def test_a_run_cut_off_from_its_store_stops_in_time(
    store: Store,
) -> None:
    held = lock(store)
    held.take()
    store.harm = lambda request: 403
    time.sleep(2.5)
    with pytest.raises(Interrupted, match="this run stopped writing"):
        held.check()
    store.calm()
    held.let_go()


def test_a_run_keeps_its_lock_if_the_response_was_lost(store: Store) -> None:
    lost: list[Request] = []

    def harm(request: Request) -> str | None:
        if request.method == "PUT" and request.key == f"{NAME}.00000001" and not lost:
            lost.append(request)
            return "lost"
        return None

    store.harm = harm
    held = lock(store)
    held.take()
    assert lost
    held.check()
    held.let_go()


def test_a_process_that_failed_to_lock_can_retry(store: Store) -> None:
    first, again = (
        StoreLock(store.path(NAME), stale_seconds=60, token="of this process") for _ in range(2)
    )
    first.take()
    with pytest.raises(InputError, match="is writing to it"):
        lock(store).take()
    again.take()
    again.check()
    with pytest.raises(Interrupted, match="another run may have taken over"):
        first.check()
    for each in (first, again):
        each.let_go()


def test_a_store_that_ignores_conditions_gives_a_warning(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.harm = lambda request: "unconditional"
    held = lock(store)
    with caplog.at_level(logging.WARNING):
        held.take()
    assert "ignores If-None-Match" in caplog.text
    with pytest.raises(InputError, match="is writing to it"):
        lock(store).take()
    held.let_go()


def test_one_run_at_a_time_holds_a_ledger_in_a_store(store: Store) -> None:
    ledger = Ledger(store.url("out"))
    ledger.open("first")
    ledger.open("first")
    with pytest.raises(InputError, match="another run of this process"):
        Ledger(store.url("out")).open("second")
    ledger.close("first")
    ledger.open("second")
    ledger.close("second")
    with pytest.raises(InputError, match=r"cannot be written.*Set data\.output\."):
        Ledger("s3://no-such-bucket/out").open("first")
