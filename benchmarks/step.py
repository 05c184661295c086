"""What one forward of our engine takes, and what the GPU does in it. Prints each reading at once.

    python benchmarks/step.py                                   6B in bfloat16 on a GPU
    python benchmarks/step.py --shape tiny --device cpu --rows 4        on a CPU, to try it

A decode step is what each further token adds to generation. Weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environments import SCRIPTS
from report import write_line
from torch.profiler import ProfilerActivity, profile
from workload import LABELS, ONE_TOKEN_LABELS, SHAPES, model_parser

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine

sys.path.insert(0, str(SCRIPTS))
from models import make_model

TOKEN = 40  # of all prompts
STEPS = 64  # decode steps of a reading
ROUNDS = 3
# Rows at once, and tokens in the prompt of each.
DECODE = ((512, 128), (256, 128), (64, 128), (512, 512))
PROMPTS = ((128, 128), (9, 128), (1, 128), (8, 2000))
LABEL_ROWS = (300, 301, 302)


class Reader:
    """An engine with random weights, and where readings go."""

    def __init__(self, options: argparse.Namespace) -> None:
        shape = SHAPES[options.shape]
        dtype = getattr(torch, options.dtype)
        model = make_model("causal", shape.config(), 0, dtype, options.device)
        self.most: int = options.rows
        self.steps: int = options.steps
        self.on_gpu = options.device.startswith("cuda")
        self._out: Path | None = options.out
        self.engine = TorchEngine(
            model, eos_id=-1, token_count=shape.vocabulary, max_slots=options.rows
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        requests = (GenerateRequest(at, prompt, tokens) for at, prompt in enumerate(prompts))
        assert not any(result.error for result in self.engine.generate(requests))

    def classify(
        self, prompts: list[list[int]], labels: tuple[tuple[int, ...], ...], shared: int = 0
    ) -> None:
        requests = (
            ClassifyRequest(at, prompt, labels, shared) for at, prompt in enumerate(prompts)
        )
        assert not any(result.error for result in self.engine.classify(requests))

    def say(self, part: str, **reading: Any) -> None:
        """Print a reading and write it."""
        facts = [f"{name} {value:.4g}" for name, value in reading.items()]
        print(f"{part}: {', '.join(facts)}", flush=True)
        write_line(self._out, {"part": part, **reading})


def seconds(work: Callable[[], Any]) -> float:
    """Wall seconds of `work`, whose results are values, so that the device has finished."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decode_steps(reader: Reader) -> None:
    """A step of so many rows, and the same beside one row that is much longer."""
    for rows, length in DECODE:
        count = min(rows, reader.most)
        step = _step(reader, [[TOKEN] * length] * count)
        reader.say("decode step", rows=count, prompt=length, ms=step * 1e3)
    rows, length = DECODE[0]
    count = min(rows, reader.most)
    mixed = [*[[TOKEN] * length] * (count - 1), [TOKEN] * 1900]
    reader.say("decode step, one row of 1,900", rows=count, ms=_step(reader, mixed) * 1e3)


def _step(reader: Reader, prompts: list[list[int]]) -> float:
    reader.generate(prompts, reader.steps + 1)  # graphs and caches
    steps = []
    for _ in range(ROUNDS):
        alone = seconds(lambda: reader.generate(prompts, 1))
        whole = seconds(lambda: reader.generate(prompts, reader.steps + 1))
        steps.append((whole - alone) / reader.steps)
    return statistics.median(steps)


def prompts(reader: Reader) -> None:
    """A forward that reads prompts, scoring one token of each."""
    for rows, length in PROMPTS:
        asked = [[TOKEN] * length] * min(rows, reader.most)
        forward = partial(reader.classify, asked, ONE_TOKEN_LABELS)
        forward()  # the first of a shape may cost more
        taken = statistics.median([seconds(forward) for _ in range(ROUNDS)])
        tokens = len(asked) * length
        reader.say("prompts", rows=len(asked), length=length, s=taken, tokens_per_s=tokens / taken)


def labels(reader: Reader) -> None:
    """Eight labels behind a shared template. A new number of rows must not cost more."""
    for rows in LABEL_ROWS:
        count = min(rows, reader.most)
        asked = [[TOKEN] * (100 + 40)] * count
        forward = partial(reader.classify, asked, LABELS, 100)
        reader.say("labels", rows=count, first_s=seconds(forward), then_s=seconds(forward))


def profiled(reader: Reader) -> None:
    """The kernels of generation and of reading prompts, and the share of time with none."""
    asked = [[TOKEN] * 128] * min(512, reader.most)
    ways: dict[str, Callable[[], None]] = {
        "generation": lambda: reader.generate(asked, 17),
        "prompts": lambda: reader.classify(asked, ONE_TOKEN_LABELS),
    }
    for name, work in ways.items():
        work()
        with profile(activities=[ProfilerActivity.CUDA]) as kernels:
            wall = seconds(work)
        averages = kernels.key_averages()
        busy = sum(kernel.self_device_time_total for kernel in averages) / 1e6
        print(averages.table(sort_by="self_cuda_time_total", row_limit=20), flush=True)
        reader.say(f"profile of {name}", wall_s=wall, kernels_s=busy, waits=1 - busy / wall)


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    if options.device.startswith("cuda"):
        print(torch.__version__, torch.cuda.get_device_name(options.device), flush=True)
    reader = Reader(options)
    try:
        for part in (decode_steps, prompts, labels):
            part(reader)
        if reader.on_gpu:
            profiled(reader)
    finally:
        reader.engine.close()


def _options() -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--rows", type=int, default=512, help="no more rows at once than these")
    parser.add_argument("--steps", type=int, default=STEPS, help="decode steps of a reading")
    return parser.parse_args()


if __name__ == "__main__":
    main()
