"""How much a busy Python thread slows an engine in its process, and in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/beside.py --rounds 7

Classifies rows with many small layers, as a GPU's launches are. Each way runs alone, beside a busy
process, which takes a core and no lock, and beside a busy thread. Needs two free cores; the fastest
of all rounds counts, because machines are shared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GlmConfig, GlmForCausalLM
from workload import SHAPES

from glmbatch.glm.checkpoint.save import save_checkpoint
from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.engine.protocol import ClassifyRequest, Engine
from glmbatch.settings.job import ModelConfig, RuntimeConfig

TOKENIZER = Path(__file__).parents[1] / "sample_data" / "tiny-chatglm2" / "tokenizer.model"
SMALL = {"num_hidden_layers": 28, "hidden_size": 32, "intermediate_size": 56, "vocab_size": 2816}
SMALL |= {"num_attention_heads": 4, "head_dim": 16, "id2label": {0: "LABEL_0"}}
PYTHONS_OWN = 0.005
# Each way: its name, whether the engine has a process of its own, and the switch interval.
WAYS = (
    ("in one process, Python's interval", False, PYTHONS_OWN),
    ("in one process, the engine's interval", False, 0.0005),
    ("in a process of its own", True, PYTHONS_OWN),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        torch.manual_seed(0)
        config = GlmConfig(**SHAPES["mid"].config() | SMALL)
        save_checkpoint(GlmForCausalLM(config), checkpoint, tokenizer_model=TOKENIZER)
        for name, own_process, interval in WAYS:
            runtime = RuntimeConfig(device="cpu", engine_process=own_process)
            engine = load_engine(ModelConfig(path=str(checkpoint), dtype="bfloat16"), runtime)
            sys.setswitchinterval(interval)
            _print(name, engine, options)
            engine.close()


def _print(name: str, engine: Engine, options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {"alone": [], "busy process": [], "busy thread": []}
    _classify(engine, options.rows)
    for _ in range(options.rounds):
        seconds["alone"].append(_classify(engine, options.rows))
        with _busy_process():
            seconds["busy process"].append(_classify(engine, options.rows))
        with _busy_thread():
            seconds["busy thread"].append(_classify(engine, options.rows))
    parts = [f"{what} {min(times):.2f} s" for what, times in seconds.items()]
    print(f"{name}: {', '.join(parts)}", flush=True)


def _classify(engine: Engine, rows: int) -> float:
    began = time.perf_counter()
    requests = (ClassifyRequest(at, [64 + at % 50] * 20, ((70,), (71,))) for at in range(rows))
    assert sum(1 for _ in engine.classify(requests)) == rows
    return time.perf_counter() - began


@contextmanager
def _busy_process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(0.1)
        yield
        process.kill()


@contextmanager
def _busy_thread() -> Iterator[None]:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


if __name__ == "__main__":
    main()
