"""An engine in a process of its own: the same answers, its faults and its end. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from glmbatch.errors import InputError, TransientError
from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.engine.pool import EnginePool
from glmbatch.glm.engine.process import EngineProcess
from glmbatch.glm.engine.protocol import ClassifyRequest, Engine, GenerateRequest
from glmbatch.glm.stop_texts import stop_at
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.settings.job import JobConfig, ModelConfig, RuntimeConfig
from glmbatch.steps.extract import ask_extractions
from glmbatch.steps.prompt import Prompt
from tests.support import CAUSAL, Settings, Write, committed, rows_of
from tests.unit.glm.tiny_glm import prompts
from tests.unit.steps.forms import steps

LABELS = ((5,), (6, 7), (6, 8))
LOADED = """
import threading, time
from glmbatch.glm.engine.loading import load_engine
from glmbatch.settings.job import ModelConfig, RuntimeConfig
runtime = RuntimeConfig(device="cpu", engine_process=True)
def load():
    engine = load_engine(ModelConfig(path={path!r}), runtime)
    print(engine.pid, flush=True)
threading.Thread(target=load).start()
time.sleep(100)
"""


def load(*, own_process: bool) -> Any:
    runtime = RuntimeConfig(device="cpu", engine_process=own_process, max_slots=4)
    return load_engine(ModelConfig(path=str(CAUSAL), dtype="float32"), runtime)


class Run:
    def check_running(self) -> None:
        """Never stopped."""


@pytest.fixture(scope="module")
def pool() -> EnginePool:
    """One pool for all tests: a process is started again only after a test that ended it."""
    return EnginePool()


@pytest.fixture
def engine(pool: EnginePool) -> Iterator[Any]:
    with pool.lease("key", lambda: load(own_process=True), 1, Run()) as engine:
        yield engine
        if not engine.alive:
            pool.discard(engine)


@pytest.fixture(scope="module", autouse=True)
def closed(pool: EnginePool) -> Iterator[None]:
    yield
    for engine in list(pool._engines.values()):
        pool.discard(engine)


def ended(pid: int) -> bool:
    """Whether the process `pid` ends within seconds; a zombie has not ended."""
    until = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


def generate_requests(count: int = 40) -> list[GenerateRequest]:
    stop = stop_at(["好", "e"], load_tokenizer(CAUSAL))
    requests = []
    for at, row in enumerate(prompts(count)):
        temperature = at % 2 * 1.2
        requests.append(
            GenerateRequest(at, row, 12, temperature=temperature, seed=at, should_stop=stop)
        )
    return requests


def classify_requests(count: int = 300) -> list[ClassifyRequest]:
    rows = [*prompts(count - 1), [5] * 9999]  # the last one is refused
    requests = [ClassifyRequest(at, row, LABELS) for at, row in enumerate(rows)]
    beside = [ClassifyRequest(count + at, [*rows[0], 7, 5 * at], LABELS) for at in range(3)]
    return [replace(requests[0], beside=tuple(beside)), *requests[1:]]


def test_typed_fields_are_the_same_in_both(engine: Any) -> None:
    tokenizer = load_tokenizer(CAUSAL)
    with closing(load(own_process=False)) as here:
        for step in steps(temperature=0.8, max_tokens=45):
            prompts = {}
            for key in (b"one", b"two"):
                (ids,) = tokenizer.encode([f"{step.name} {key!r}"])
                prompts[key] = Prompt("", ids)
            answers = dict(ask_extractions(step, prompts, here, tokenizer))
            assert dict(ask_extractions(step, prompts, engine, tokenizer)) == answers
            assert len(answers) == 2


def test_it_answers_as_the_same_engine_in_one_process(engine: EngineProcess) -> None:
    def ask(asked: Engine) -> list[Sequence[Any]]:
        with ThreadPoolExecutor(2) as pool:
            written = pool.submit(lambda: list(asked.generate(generate_requests())))
            scored = pool.submit(lambda: list(asked.classify(classify_requests())))
        return [sorted(written.result(), key=index), sorted(scored.result(), key=index)]

    def index(result: Any) -> int:
        number: int = result.index
        return number

    here = load(own_process=False)
    written, scored = ask(here)
    here.close()
    apart = ask(engine)
    assert apart[0] == written
    assert {result.finish_reason for result in written} == {"stop", "length"}
    assert len(scored) == 303
    assert scored[299].error == apart[1][299].error != None  # noqa: E711
    for one, other in zip(scored, apart[1], strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5, rel=0)


def test_closing_the_iterator_cancels_its_requests(engine: EngineProcess) -> None:
    results = engine.generate(GenerateRequest(at, [5, 6], 200 if at else 1) for at in range(4000))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(list(engine.generate([GenerateRequest(0, [5], 2)]))) == 1


def test_a_call_may_end_in_the_middle_of_a_send(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = engine.generate(GenerateRequest(at, [5, 6], 20) for at in range(9))
    next(results)
    send = engine._connection.send

    def interrupted(message: Any) -> None:
        results.close()  # type: ignore[attr-defined] # as the garbage collector may, at any time
        send(message)

    monkeypatch.setattr(engine._connection, "send", interrupted)
    assert len(list(engine.generate([GenerateRequest(0, [5], 2)]))) == 1


def test_errors_reach_their_own_caller_only(engine: EngineProcess) -> None:
    with pytest.raises(InputError, match="has no trained head"):
        list(engine.classify([ClassifyRequest(0, [5])]))
    with pytest.raises(InputError, match="cannot be sent to the engine's process"):
        list(engine.generate([GenerateRequest(0, [5], 9, should_stop=lambda _: True)]))
    with pytest.raises(TypeError, match="unhashable"):
        list(engine.generate([GenerateRequest(0, [5], 9, should_stop=hash)]))  # type: ignore
    assert engine.alive
    assert list(engine.classify([])) == []


def test_a_checkpoint_that_does_not_load_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = psutil.Process().children()
    runtime = RuntimeConfig(device="cpu", engine_process=True)
    with pytest.raises(InputError, match="config"):
        load_engine(ModelConfig(path=str(tmp_path)), runtime)
    assert psutil.Process().children() == before


def test_a_killed_process_fails_waiting_and_later_calls(engine: EngineProcess) -> None:
    results = engine.generate(GenerateRequest(at, [5, 6], 200) for at in range(500))
    threading.Timer(0.2, os.kill, [engine.pid, signal.SIGKILL]).start()
    with pytest.raises(TransientError, match=r"was killed by SIGKILL\. Load it again"):
        list(results)
    with pytest.raises(TransientError, match="SIGKILL"):
        engine.classify([])
    assert not engine.alive
    assert ended(engine.pid)


def test_closing_ends_the_process_and_waiting_calls(engine: EngineProcess) -> None:
    threads = set(threading.enumerate())
    results = engine.generate(GenerateRequest(at, [5, 6], 200 if at else 1) for at in range(500))
    next(results)
    threading.Timer(0.2, engine.close).start()
    with pytest.raises(TransientError, match="the engine was closed"):
        list(results)
    assert ended(engine.pid)
    engine.close()
    assert set(threading.enumerate()) < threads


@pytest.mark.slow
def test_it_ends_when_its_parent_is_killed() -> None:
    program = [sys.executable, "-c", LOADED.format(path=str(CAUSAL))]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    assert ended(pid)


@pytest.mark.slow
def test_a_run_goes_on_after_its_engine_was_killed(
    job_settings: Settings, write_source: Write, out: Path, own_engines: None
) -> None:
    from glmbatch.pipeline import run_job

    write_source("a.parquet", {"text": [f"row {row}" for row in range(64)]})
    job = JobConfig.model_validate(job_settings(runtime__engine_process=True))

    def kill() -> None:
        while not committed(out):
            time.sleep(0.001)
        for child in psutil.Process().children():
            if child not in others:
                child.kill()

    others = psutil.Process().children()
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TransientError, match="was killed by SIGKILL"):
        run_job(job)
    killer.join()
    before = committed(out)
    run_job(job)
    assert before <= committed(out), "committed answers were computed again"
    answered = rows_of(out)
    assert len(answered) == 64
    assert all(row["mood"] and row["reply"] is not None for row in answered)


def test_an_interrupt_while_sending_loses_no_call(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine._sending:
        other = ThreadPoolExecutor(1).submit(list, engine.classify(classify_requests(3)))
        while not engine._unsent:
            time.sleep(0.01)
    interrupts = iter([KeyboardInterrupt()])

    def send(message: Any) -> None:
        raise next(interrupts, OSError())

    monkeypatch.setattr(engine._connection, "send", send)
    with pytest.raises(KeyboardInterrupt):
        list(engine.classify(classify_requests(2)))
    with pytest.raises(TransientError, match="SIGKILL"):
        other.result(timeout=20)
