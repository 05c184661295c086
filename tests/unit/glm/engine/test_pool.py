"""The engines of a process are shared, closed to make room, and closed for one run only."""

from __future__ import annotations

import threading

from glmbatch.glm.engine.pool import EnginePool


class SlowEngine:
    """An engine whose `close` waits, as if for its current forward."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.may_close = threading.Event()

    def close(self) -> None:
        self.closing.set()
        assert self.may_close.wait(10)


class Run:
    """An owner that is never stopped."""

    def check_running(self) -> None:
        """Nothing."""


def lease(pool: EnginePool, key: str, owner: Run) -> SlowEngine:
    with pool.lease(key, SlowEngine, 2, owner) as engine:  # type: ignore[arg-type, type-var]
        assert isinstance(engine, SlowEngine)
        return engine


def test_an_engine_being_closed_is_not_leased() -> None:
    pool = EnginePool()
    stopped, other = Run(), Run()
    with (
        pool.lease("a", SlowEngine, 2, stopped) as first,  # type: ignore[arg-type, type-var]
        pool.lease("b", SlowEngine, 2, stopped) as second,  # type: ignore[arg-type, type-var]
    ):
        closer = threading.Thread(target=pool.close_unshared, args=(stopped,))
        closer.start()
        assert first.closing.wait(10)
        # The second engine waits for the first to close, and nobody can lease it any more.
        assert lease(pool, "b", other) is not second
        first.may_close.set()
        second.may_close.set()
        closer.join(10)
        assert second.closing.is_set()


def test_an_engine_used_by_two_runs_stays_open() -> None:
    pool = EnginePool()
    stopped, other = Run(), Run()
    with (
        pool.lease("a", SlowEngine, 1, stopped) as engine,  # type: ignore[arg-type, type-var]
        pool.lease("a", SlowEngine, 1, other) as same,  # type: ignore[arg-type, type-var]
    ):
        pool.close_unshared(stopped)
        assert same is engine
        assert not engine.closing.is_set()
    assert lease(pool, "a", other) is engine


def test_a_run_that_ended_is_not_kept_in_memory() -> None:
    pool = EnginePool()
    lease(pool, "a", Run())
    assert not any(pool._leases.values())
