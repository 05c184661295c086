"""The best speed of this machine in matrix products and in memory traffic."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

TOKENS = 2048
READINGS = 16
READING_SECONDS = (
    0.02  # shorter work is repeated within a reading, because clocks tick in milliseconds
)
PRODUCT_SECONDS = 2.0  # no further readings of a product after this
BUFFER_BYTES = 1 << 29  # 512 MiB, far more than any cache


def device_name(device: str) -> str:
    """The name of the GPU or the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.machine()


def product_flops(width: int, out: int, dtype: torch.dtype, device: str) -> float:
    """Operations per second of [2048, width] x [width, out], in the fastest weight layout."""
    left = torch.randn(TOKENS, width, device=device, dtype=dtype)
    right = torch.randn(out, width, device=device, dtype=dtype)
    # Preallocate the output: page faults of fresh memory cost a third of the time.
    into = torch.empty(TOKENS, out, device=device, dtype=dtype)
    ways: list[Callable[[], Any]] = [
        partial(torch.mm, left, right.t(), out=into),
        partial(torch.mm, left, right.t().contiguous(), out=into),
    ]
    if device == "cpu" and torch._C._has_mkldnn:
        # oneDNN's own weight layout: 1.15 times `mm` on AMD processors, where `mm` calls MKL.
        packed = torch.ops.mkldnn._reorder_linear_weight(right, TOKENS)
        ways.append(partial(torch.ops.mkldnn._linear_pointwise, left, packed, None, "none", [], ""))
    with torch.inference_mode():
        seconds = min(_best_seconds(way, device) for way in ways)
    return 2 * TOKENS * width * out / seconds


def bytes_per_second(device: str) -> float:
    """Bytes per second of summing or copying 512 MiB, whichever is faster. A copy counts twice."""
    source = torch.ones(BUFFER_BYTES // 4, device=device)
    into = torch.empty_like(source)
    summed = BUFFER_BYTES / _best_seconds(source.sum, device)
    copied = 2 * BUFFER_BYTES / _best_seconds(lambda: into.copy_(source), device)
    return max(summed, copied)


def _best_seconds(work: Callable[[], Any], device: str) -> float:
    """Median of the faster half. On a shared machine the slower half shows the load of others."""
    once = max(min(_seconds(work, device, 1) for _ in range(2)), 1e-6)
    repeats = max(1, round(READING_SECONDS / once))
    count = max(3, min(READINGS, int(PRODUCT_SECONDS / (once * repeats))))
    readings = sorted(_seconds(work, device, repeats) for _ in range(count))
    return statistics.median(readings[: (count + 1) // 2])


def _seconds(work: Callable[[], Any], device: str, repeats: int) -> float:
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    start = clock()
    for _ in range(repeats):
        work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (clock() - start) / repeats
