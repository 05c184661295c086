"""Which device computes, and in which numbers. Imports torch, but loads no model."""

from __future__ import annotations

from typing import Literal

import torch

from glmbatch.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def resolve_device(name: str) -> str:
    """The device that the setting names, "cpu" or "cuda:N"; InputError when there is none."""
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return "cpu"
    index = int(name.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        raise InputError(f"{name}: this machine has {count} CUDA devices. Set runtime.device.")
    return f"cuda:{index}"


def describe_device(name: str) -> str:
    """The device that the setting names, in words for a report."""
    device = resolve_device(name)
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}"


def resolve_dtype(dtype: str, device: str) -> Dtype:
    """The numbers that the setting names; "auto" depends on the device."""
    # On CPUs without matrix units for it, bfloat16 runs at 0.6 of the speed of float32.
    if dtype == "auto":
        return "bfloat16" if device.startswith("cuda") else "float32"
    return dtype  # type: ignore[return-value]


def free_memory_bytes(device: str) -> int:
    """Memory in bytes that is free on `device`."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
