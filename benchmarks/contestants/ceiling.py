"""The limit of every contestant: the machine's speed in the model's largest matrix products."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from machine import bytes_per_second, device_name, product_flops
from protocol import Run, serve


def load(options: argparse.Namespace, work: dict[str, Any]) -> tuple[str, Run]:
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    hidden = work["config"]["hidden_size"]
    inner = work["config"]["intermediate_size"]

    def run() -> list[float]:
        """Operations per second and bytes per second."""
        up = product_flops(hidden, 2 * inner, dtype, options.device)
        down = product_flops(inner, hidden, dtype, options.device)
        return [max(up, down), bytes_per_second(options.device)]

    return f"{device_name(options.device)}, torch {torch.__version__}", run


if __name__ == "__main__":
    serve(load)
