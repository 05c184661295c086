"""What the machine can do: the model's own largest matrix products, and reading memory. No model is faster."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from protocol import Run, serve

TOKENS = 2048
READINGS = 16
READING_SECONDS = 0.02  # a reading repeats what takes less
PRODUCT_SECONDS = 2.0  # readings of one product end after so long
BUFFER_BYTES = 1 << 29


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype, device, config = getattr(torch, options.dtype), options.device, work["config"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def run() -> list[float]:
        flops = max(
            _product_flops(*sizes, dtype, device)
            for sizes in ((hidden, 2 * inner), (inner, hidden))
        )
        return [flops, _bandwidth(device)]

    return f"{_name(device)}, torch {torch.__version__}", run


def _name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _product_flops(width: int, out: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of [tokens, width] x [width, out], the best of both layouts of the weight and of oneDNN's.

    `mm` writes to memory that is already there: a page fault for each page of a fresh output costs a third of the time.
    """
    left = torch.randn(TOKENS, width, device=device, dtype=dtype)
    right = torch.randn(out, width, device=device, dtype=dtype)
    into = torch.empty(TOKENS, out, device=device, dtype=dtype)
    ways: list[Callable[[], Any]] = [
        partial(torch.mm, left, right.t(), out=into),
        partial(torch.mm, left, right.t().contiguous(), out=into),
    ]
    if device == "cpu" and torch._C._has_mkldnn:
        # Its own arrangement of the weight: 1.15 of `mm` on AMD's processors, for which `mm` calls MKL.
        packed = torch.ops.mkldnn._reorder_linear_weight(right, TOKENS)
        ways.append(partial(torch.ops.mkldnn._linear_pointwise, left, packed, None, "none", [], ""))
    with torch.inference_mode():
        return 2 * TOKENS * width * out / min(_best_seconds(way, device) for way in ways)


def _bandwidth(device: str) -> float:
    """Bytes read and written a second by the better of a sum and a copy, far larger than the caches."""
    source = torch.ones(BUFFER_BYTES // 4, device=device)
    into = torch.empty_like(source)
    summed = BUFFER_BYTES / _best_seconds(source.sum, device)
    copied = 2 * BUFFER_BYTES / _best_seconds(lambda: into.copy_(source), device)
    return max(summed, copied)


def _best_seconds(work: Callable[[], Any], device: str) -> float:
    """Median of the fastest half: on a shared machine the slow half says what others did."""
    once = max(min(_seconds(work, device, 1) for _ in range(2)), 1e-6)
    repeats = max(1, round(READING_SECONDS / once))
    most = max(3, min(READINGS, int(PRODUCT_SECONDS / (once * repeats))))
    readings = sorted(_seconds(work, device, repeats) for _ in range(most))
    return statistics.median(readings[: (most + 1) // 2])


def _seconds(work: Callable[[], Any], device: str, repeats: int) -> float:
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    began = clock()
    for _ in range(repeats):
        work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (clock() - began) / repeats


if __name__ == "__main__":
    serve(load)
