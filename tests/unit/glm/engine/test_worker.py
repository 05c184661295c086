"""The engine as callers see it: threads, cancellation, failures, out of memory, golden answers."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glmbatch.errors import DeviceLost, InputError, TransientError
from glmbatch.glm.checkpoint import load
from glmbatch.glm.checkpoint.load import load_weights
from glmbatch.glm.device import free_memory_bytes
from glmbatch.glm.engine import loading, worker
from glmbatch.glm.engine.calls import LOOK_AHEAD
from glmbatch.glm.engine.loading import EngineSettings, load_engine
from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.settings.job import ModelConfig, RuntimeConfig
from tests.unit.glm.cuda_on_cpu import on_cuda_path
from tests.unit.glm.tiny_glm import EOS, TOKENS, causal_model, engine_over, head_model, prompts

GOLDENS = Path(__file__).parents[3] / "goldens"
PLACE_BYTES = 2 * 3 * 2 * 16 * 4
LABELS = ((5,), (6, 7), (6, 8))
BUSY_AT_ITS_END = """
from glmbatch.glm.engine.protocol import GenerateRequest
from tests.unit.glm.tiny_glm import TOKENS, TorchEngine, causal_model
engine = TorchEngine(causal_model(), eos_id=-1, token_count=TOKENS)
results = engine.generate(GenerateRequest(at, [5, 6], 200 if at else 1) for at in range(4000))
next(results)
"""


class FullAbove(torch.nn.Module):
    """An embedding that runs out of memory above `tokens` tokens or `rows` rows.

    After `refusals` failures, anything fits.
    """

    def __init__(self, embedding: torch.nn.Module, tokens: int, rows: int, refusals: int) -> None:
        super().__init__()
        self.embedding, self.weight = embedding, embedding.weight
        self.tokens, self.rows, self.refusals = tokens, rows, refusals
        self.refused = 0
        self.forwards = 0
        self.error: Exception = torch.OutOfMemoryError("out of memory")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if (ids.numel() > self.tokens or len(ids) > self.rows) and self.refused < self.refusals:
            self.refused += 1
            raise self.error
        self.forwards += 1
        embedded: torch.Tensor = self.embedding(ids)
        return embedded


class NoRoomFor(FullAbove):
    """An embedding that runs out of memory with `token` in the batch."""

    def __init__(self, embedding: torch.nn.Module, token: int) -> None:
        super().__init__(embedding, 0, 10**6, 10**6)
        self.token = token

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.tokens = 0 if self.token in ids else 10**6
        return super().forward(ids)


def full_above(model: Any, tokens: int, rows: int = 10**6, refusals: int = 10**6) -> Any:
    model.model.embed_tokens = FullAbove(model.model.embed_tokens, tokens, rows, refusals)
    return model


def generate_requests(count: int = 20) -> list[GenerateRequest]:
    return [
        GenerateRequest(at, row, 12, temperature=at % 2 * 1.2, seed=at)
        for at, row in enumerate(prompts(count, longest=30))
    ]


def test_importing_the_protocol_loads_no_torch() -> None:
    modules = "glmbatch.glm.engine.loading, glmbatch.glm.engine.pool"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
        ),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_makes_classify_batches_smaller(error: Exception) -> None:
    rows = prompts(30)
    requests = [ClassifyRequest(at, row, LABELS) for at, row in enumerate(rows)]
    with engine_over(causal_model()) as engine:
        expected = {result.index: result.scores for result in engine.classify(requests)}
    model = full_above(causal_model(), tokens=100)
    model.model.embed_tokens.error = error
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS)
    results = list(engine.classify(requests))
    assert sorted(result.index for result in results) == list(range(30))
    for result in results:
        assert result.scores == pytest.approx(expected[result.index], abs=1e-5, rel=0)
    refused = model.model.embed_tokens.refused
    assert 0 < refused < 8
    list(engine.classify(requests))
    assert model.model.embed_tokens.refused == refused, "the smaller batch is remembered"
    engine.close()


def test_out_of_memory_loses_and_repeats_no_token() -> None:
    requests = generate_requests()
    with engine_over(causal_model(), max_slots=8) as engine:
        expected = {result.index: result for result in engine.generate(requests)}
    model = full_above(causal_model(), tokens=60, rows=3)
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS, max_slots=8)
    results = list(engine.generate(requests))
    assert len(results) == len(requests)
    assert {result.index: result for result in results} == expected
    refused = model.model.embed_tokens.refused
    list(engine.generate(requests))
    assert model.model.embed_tokens.refused == refused > 0
    engine.close()


def test_a_row_that_fits_only_alone_takes_no_slots() -> None:
    requests = [GenerateRequest(99, [5, 6] * 40, 12), *generate_requests()]
    with engine_over(causal_model(), max_slots=8) as engine:
        expected = {result.index: result for result in engine.generate(requests)}
    model = full_above(causal_model(), tokens=15, refusals=1)
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS, max_slots=8, max_batch_tokens=16)
    results = list(engine.generate(requests))
    assert model.model.embed_tokens.refused == 1
    assert len(results) == len(requests)
    assert {result.index: result for result in results} == expected
    engine.close()


def test_a_prompt_too_long_for_a_forward_is_chunked() -> None:
    asked = [5, 6, 7, 8] * 20
    with engine_over(causal_model()) as engine:
        (scored,) = engine.classify([ClassifyRequest(0, asked, LABELS)])
        (written,) = engine.generate([GenerateRequest(0, asked, 12)])
    engine = TorchEngine(full_above(causal_model(), tokens=25), eos_id=EOS, token_count=TOKENS)
    (again,) = engine.classify([ClassifyRequest(0, asked, LABELS)])
    assert again.scores == pytest.approx(scored.scores, abs=1e-5, rel=0)
    assert list(engine.generate([GenerateRequest(0, asked, 12)])) == [written]
    engine.close()


def test_the_arena_gives_way_when_smaller_forwards_do_not_fit() -> None:
    requests = generate_requests()
    with engine_over(causal_model(), max_slots=8) as engine:
        expected = {result.index: result for result in engine.generate(requests)}
    model = full_above(causal_model(), tokens=10**6)
    with engine_over(model, max_slots=8, max_batch_tokens=512) as engine:
        runner, embedding = engine._generation._runner, engine._network._embed

        def forward(ids: torch.Tensor) -> torch.Tensor:
            arena = runner._arena
            # Another process has taken memory: 1,000 places are all that fits beside a forward.
            if arena is not None and arena.places > 1000:
                raise torch.OutOfMemoryError("out of memory")
            embedded: torch.Tensor = embedding.embedding(ids)
            return embedded

        embedding.forward = forward
        assert {result.index: result for result in engine.generate(requests)} == expected
        assert runner._arena is not None
        assert 256 < runner._arena.places <= 1000
        assert engine._generation._limits.batch_tokens > 32


def test_rows_give_way_before_prompts_of_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [GenerateRequest(at, [5, at + 3], 30) for at in range(100)]
    with engine_over(causal_model(), max_slots=64) as engine:
        expected = {result.index: result for result in engine.generate(requests)}
        logits = engine._network.token_logits

        def full(hidden_RC: torch.Tensor) -> torch.Tensor:
            if len(hidden_RC) > 40:
                raise torch.OutOfMemoryError("out of memory")
            return logits(hidden_RC)

        monkeypatch.setattr(engine._network, "token_logits", full)
        assert {result.index: result for result in engine.generate(requests)} == expected
        assert engine._generation._limits.batch_tokens >= 32
        assert 16 <= engine.slots <= 40


def test_an_idle_arena_gives_way_before_batches_do() -> None:
    requests = [ClassifyRequest(at, row, LABELS) for at, row in enumerate(prompts(30))]
    with engine_over(full_above(causal_model(), tokens=10**6)) as engine:
        written = list(engine.generate(generate_requests()))
        limits, runner = engine._generation._limits, engine._generation._runner
        before = replace(limits)
        embedding = engine._network._embed
        embedding.tokens, embedding.refusals = 50, 1
        assert not any(result.error for result in engine.classify(requests))
        assert (embedding.refused, runner.has_arena, limits) == (1, False, before)
        assert list(engine.generate(generate_requests())) == written
        embedding.refusals = 2
        assert not any(result.error for result in engine.classify(requests))
        assert runner.has_arena, "it gives way only once"
        assert limits.batch_tokens < before.batch_tokens


def test_a_row_that_never_fits_fails_alone() -> None:
    few = [GenerateRequest(at, row, 12) for at, row in enumerate(prompts(20, longest=9))]
    with engine_over(causal_model()) as engine:
        expected = {result.index: result for result in engine.generate(few)}
    used = {token for request in few for token in request.prompt_ids}
    used |= {token for result in expected.values() for token in result.ids}
    own = min(set(range(3, TOKENS)) - used)
    model = causal_model()
    model.model.embed_tokens = NoRoomFor(model.model.embed_tokens, own)
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS)
    (scored,) = engine.classify([ClassifyRequest(0, [own] * 80, LABELS)])
    assert (scored.scores, scored.error) == (
        (),
        "not enough memory on cpu for one prompt of 80 tokens",
    )
    written = {
        result.index: result
        for result in engine.generate([GenerateRequest(99, [own] * 80, 4), *few])
    }
    failed = written.pop(99)
    assert (failed.ids, failed.error) == (
        (),
        "not enough memory on cpu to generate for one row of 80 tokens",
    )
    assert written == expected
    engine.close()


def test_memory_that_torch_has_cached_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = {"mem_get_info": (100, 999), "memory_reserved": 60, "memory_allocated": 35}
    for name, reading in readings.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, reading=reading: reading)
    assert free_memory_bytes("cuda:0") == 100 + 60 - 35


def test_each_thread_gets_its_own_results() -> None:
    rows = prompts(40)
    with engine_over(causal_model(), max_slots=6, max_batch_tokens=200) as engine:

        def ask(caller: int) -> list[Any]:
            mine = rows[caller * 8 : caller * 8 + 8]
            answers: Iterator[Any]
            if caller % 2:
                answers = engine.classify(
                    ClassifyRequest(at, row, LABELS) for at, row in enumerate(mine)
                )
            else:
                answers = engine.generate(
                    GenerateRequest(at, row, 9) for at, row in enumerate(mine)
                )
            return sorted(answers, key=lambda answer: answer.index)

        alone = [ask(caller) for caller in range(5)]
        with ThreadPoolExecutor(5) as pool:
            together = list(pool.map(ask, range(5)))
    for one, other in zip(alone, together, strict=True):
        if hasattr(one[0], "ids"):
            assert one == other
        else:
            assert [row.index for row in one] == [row.index for row in other]
            for left, right in zip(one, other, strict=True):
                assert left.scores == pytest.approx(right.scores, abs=1e-5, rel=0)


def test_classify_and_generate_share_the_device_fairly() -> None:
    with engine_over(causal_model(), max_slots=2, max_batch_tokens=64) as engine:
        slow = engine.generate(GenerateRequest(at, [5, 6], 100) for at in range(8))
        ended: list[str] = []

        def drain() -> None:
            for _ in slow:
                ended.append("generate")

        thread = threading.Thread(target=drain)
        thread.start()
        for _ in engine.classify(ClassifyRequest(at, [5, 6, 7], LABELS) for at in range(10)):
            ended.append("classify")
        thread.join()
    assert ended.index("classify") < len(ended) - 11, (
        "rows that came second do not wait for the first to be done"
    )
    assert ended.count("generate") == 8


def test_requests_are_read_only_as_needed() -> None:
    taken = 0

    def requests() -> Iterator[ClassifyRequest]:
        nonlocal taken
        while True:
            yield ClassifyRequest(taken, [5, 6], LABELS)
            taken += 1

    with engine_over(causal_model()) as engine:
        results = engine.classify(requests())
        for _ in range(50):
            next(results)
        results.close()  # type: ignore[attr-defined]
        assert taken <= LOOK_AHEAD + 50
        assert len(list(engine.generate([GenerateRequest(0, [5], 3)]))) == 1


def test_closing_the_iterator_cancels_its_requests() -> None:
    model = full_above(causal_model(), tokens=10**6)
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS, max_slots=2)
    requests = (GenerateRequest(at, [5, 6], 200 if at else 1) for at in range(500))
    results = engine.generate(requests)
    next(results)
    results.close()  # type: ignore[attr-defined]
    list(engine.generate([GenerateRequest(0, [5], 2)]))
    assert model.model.embed_tokens.forwards < 1000, "all of them would take 50,000"
    engine.close()


def test_an_error_in_the_callers_iterable_is_raised() -> None:
    def requests() -> Iterator[GenerateRequest]:
        yield GenerateRequest(0, [5], 200)
        raise LookupError("mine")

    with engine_over(causal_model()) as engine:
        with pytest.raises(LookupError, match="mine"):
            list(engine.generate(requests()))
        assert engine.alive


def test_no_requests_give_no_results() -> None:
    with engine_over(head_model()) as engine:
        assert list(engine.classify([])) == []


def test_a_failure_reaches_waiting_and_later_callers() -> None:
    model = full_above(causal_model(), tokens=10**6)
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS, max_slots=2)

    def ask(caller: int) -> None:
        for result in engine.generate(GenerateRequest(at, [5, 6], 200) for at in range(50)):
            if result.index > 2:
                model.model.embed_tokens.error = ValueError("broken")
                model.model.embed_tokens.tokens = 0

    with ThreadPoolExecutor(3) as pool:
        failures = [pool.submit(ask, caller).exception() for caller in range(3)]
    for failure in failures:
        assert isinstance(failure, TransientError)
        assert "ValueError: broken" in str(failure)
        assert isinstance(failure.__cause__, ValueError)
    assert not engine.alive
    with pytest.raises(TransientError, match="broken"):
        engine.classify([])
    engine.close()


def test_a_lost_gpu_is_not_retried_in_this_process() -> None:
    model = full_above(causal_model(), tokens=0)
    model.model.embed_tokens.error = torch.AcceleratorError("CUDA error: an illegal memory access")
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS)
    with pytest.raises(DeviceLost, match=r"the GPU failed: CUDA error.*: run again"):
        list(engine.generate([GenerateRequest(0, [5], 2)]))
    with pytest.raises(DeviceLost):
        engine.classify([])
    assert not engine.alive
    engine.close()


def test_a_failed_engine_is_not_kept_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.logger, "exception", lambda message: None)
    model = full_above(causal_model(), tokens=0)
    model.model.embed_tokens.error = ValueError("broken")
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS)
    with pytest.raises(TransientError, match="broken"):
        list(engine.generate([GenerateRequest(0, [5], 2)]))
    engine.wait()
    network = weakref.ref(engine._network)
    del engine, model
    gc.collect()
    assert network() is None


def test_limits_lowered_by_the_warm_up_are_restored() -> None:
    model = full_above(causal_model(), tokens=12, rows=3)
    engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS, max_slots=8)
    before = replace(engine.limits)
    loading.warm_up(engine)
    assert model.model.embed_tokens.refused > 0
    assert engine.limits == before
    engine.close()


def test_two_models_get_caches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1 << 20
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "free_memory_bytes", lambda device: free)
        first = TorchEngine(causal_model(), eos_id=EOS, token_count=TOKENS, models_at_once=2)
    list(first.generate([GenerateRequest(0, [5], 2)]))
    held = first.arena_bytes
    assert 0 < held <= first.limits.cache_bytes + 4096
    monkeypatch.setattr(worker, "free_memory_bytes", lambda device: free - held)
    second = TorchEngine(
        causal_model(), eos_id=EOS, token_count=TOKENS, models_at_once=2, arenas_bytes=held
    )
    assert second.limits.cache_bytes == first.limits.cache_bytes
    first.close()
    second.close()


def test_an_engine_that_fails_its_warm_up_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())

    def interrupted(engine: TorchEngine) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "warm_up", interrupted)
    monkeypatch.setattr(load, "load_weights", lambda path, dtype, device, adapter: loaded)
    loaded = load_weights(GOLDENS / "base-sharded", "bfloat16", "cpu")
    settings = EngineSettings(
        path=str(GOLDENS / "base-sharded"),
        adapter=None,
        dtype="bfloat16",
        quantization="none",
        device="cuda:0",
        max_batch_tokens=None,
        max_slots=2,
        models_at_once=1,
    )
    with pytest.raises(KeyboardInterrupt):
        loading.load_here(settings)
    assert set(threading.enumerate()) <= before


def test_closing_ends_the_worker_and_waiting_calls() -> None:
    before = set(threading.enumerate())
    with engine_over(causal_model(), max_slots=1) as engine:
        results = engine.generate(
            GenerateRequest(at, [5, 6], 200 if at else 1) for at in range(500)
        )
        next(results)
        engine.close()
        with pytest.raises(TransientError, match="closed"):
            list(results)
        with pytest.raises(TransientError, match="closed"):
            engine.generate([])
        assert set(threading.enumerate()) <= before


@pytest.mark.slow
def test_a_program_may_end_with_a_busy_engine() -> None:
    program = [sys.executable, "-c", BUSY_AT_ITS_END]
    ended = subprocess.run(program, check=False, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, ""), "it ended as if it had failed"


def load_golden(name: str, **runtime: Any) -> tuple[Any, Any, Any]:
    folder = GOLDENS / name
    engine = load_engine(
        ModelConfig(path=str(folder), dtype="float32"), RuntimeConfig(device="cpu", **runtime)
    )
    return engine, json.loads((folder / "golden.json").read_text()), np.load(folder / "golden.npz")


def test_golden_class_logits_alone_and_in_a_batch() -> None:
    engine, golden, arrays = load_golden("classifier")
    requests = [ClassifyRequest(at, row["input_ids"]) for at, row in enumerate(golden["rows"])]
    together = {result.index: result.scores for result in engine.classify(requests)}
    for at, request in enumerate(requests):
        (alone,) = engine.classify([request])
        assert alone.scores == pytest.approx(arrays["alone_class_logits"][at], abs=1e-4, rel=0)
        assert together[at] == pytest.approx(arrays["batch_class_logits"][at], abs=1e-4, rel=0)
    engine.close()


@pytest.mark.parametrize("name", ["base-sharded", "int4"])
@pytest.mark.parametrize("slots", [1, 32])
def test_golden_greedy_ids(name: str, slots: int) -> None:
    engine, golden, _ = load_golden(name, max_slots=slots)
    rows = golden["rows"]
    results = engine.generate(
        GenerateRequest(at, row["input_ids"], 24) for at, row in enumerate(rows)
    )
    for result in results:
        expected = rows[result.index]["greedy_ids"]
        ended = EOS in expected
        assert list(result.ids) == (expected[: expected.index(EOS)] if ended else expected)
        assert result.finish_reason == ("stop" if ended else "length")
    engine.close()


def test_loading_on_a_missing_device_is_an_input_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(InputError, match="device"):
        load_engine(ModelConfig(path=str(GOLDENS / "int4")), RuntimeConfig(device="cuda"))


@pytest.mark.parametrize("shared", [60, 79])
def test_a_prefix_too_long_for_a_forward_is_chunked(shared: int) -> None:
    asked = [5, 6, 7, 8] * 20
    with engine_over(causal_model()) as engine:
        (scored,) = engine.classify([ClassifyRequest(0, asked, LABELS)])
        (written,) = engine.generate([GenerateRequest(0, asked, 12)])
    for kind in (0, 1):
        engine = TorchEngine(full_above(causal_model(), tokens=40), eos_id=EOS, token_count=TOKENS)
        if kind:
            request = GenerateRequest(0, asked, 12, shared_tokens=shared)
            assert list(engine.generate([request])) == [written]
        else:
            (again,) = engine.classify([ClassifyRequest(0, asked, LABELS, shared_tokens=shared)])
            assert again.scores == pytest.approx(scored.scores, abs=1e-5, rel=0)
        engine.close()


def test_a_prompt_that_never_fits_fails_no_generation() -> None:
    few = [GenerateRequest(at, row, 40) for at, row in enumerate(prompts(40, longest=9))]
    with engine_over(causal_model(), max_slots=4) as engine:
        expected = {result.index: result for result in engine.generate(few)}
    model = causal_model()
    model.model.embed_tokens = NoRoomFor(model.model.embed_tokens, token=TOKENS)
    engine = TorchEngine(
        model, eos_id=EOS, token_count=TOKENS, max_slots=4, cache_bytes=1024 * PLACE_BYTES
    )
    results = engine.generate(few)
    written = [next(results)]
    (scored,) = engine.classify([ClassifyRequest(0, [TOKENS] * 200, LABELS)])
    assert "not enough memory" in (scored.error or "")
    written += results
    assert {result.index: result for result in written} == expected
    engine.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_closed_engine_is_freed_without_a_search(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps what is logged, with the frames of its errors.
    monkeypatch.setattr(worker.logger, "exception", lambda message: None)
    with on_cuda_path(monkeypatch) as recorder:
        model = causal_model()
        if fails:
            model = full_above(model, tokens=30)
            model.model.embed_tokens.error = ValueError("broken")
        engine = TorchEngine(model, eos_id=EOS, token_count=TOKENS)
        list(engine.generate([GenerateRequest(at, [5, 6], 20) for at in range(4)]))
        assert recorder.replayed
        gc.collect()
        gc.disable()
        try:
            if fails:
                with pytest.raises(TransientError, match="broken"):
                    list(engine.generate([GenerateRequest(0, [5] * 40, 2)]))
            engine.close()
            network = weakref.ref(engine._network)
            del engine, model
            assert network() is None
        finally:
            gc.enable()
