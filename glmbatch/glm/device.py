"""Resolves the device and dtype settings. Loads no model, and torch only for a GPU."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Literal

from glmbatch.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def resolve_device(name: str) -> str:
    """The device for the setting `name`: "cpu" or "cuda:N"; "auto" prefers the first GPU.

    Raises InputError if this machine has no such CUDA device.
    """
    if name == "cpu" or (name == "auto" and not _has_driver()):
        return "cpu"
    import torch

    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    index = int(name.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        raise InputError(f"{name}: this machine has {count} CUDA devices. Set runtime.device.")
    return f"cuda:{index}"


def _has_driver() -> bool:
    """Whether torch may find a GPU here. Asked first, because importing torch takes seconds."""
    if sys.platform != "linux" or Path("/dev/kfd").exists():  # AMD's driver
        return True
    try:
        ctypes.CDLL("libcuda.so.1")  # NVIDIA's driver; torch uses no GPU without it
    except OSError:
        return False
    return True


def describe_device(name: str) -> str:
    """The device for the setting `name` as a report shows it: number of threads or GPU name.

    Raises InputError if this machine has no such CUDA device.
    """
    import torch

    device = resolve_device(name)
    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}"


def resolve_dtype(dtype: str, device: str) -> Dtype:
    """The dtype for the setting `dtype`; "auto" is bfloat16 on CUDA and float32 on CPU."""
    # On CPUs without bfloat16 matrix units, bfloat16 runs at 0.6 times the speed of float32.
    if dtype == "auto":
        return "bfloat16" if device.startswith("cuda") else "float32"
    return dtype  # type: ignore[return-value]


def prepare_cuda() -> None:
    """Set what torch's defaults on CUDA are wrong for here; for the whole process."""
    import torch

    # Masked attention would prefer cuDNN, which plans 0.05 to 0.7 s for each new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Partial sums of a product stay in float32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def free_memory_bytes(device: str) -> int:
    """Free memory of `device` in bytes, for this process; for "cpu", also for new ones."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        # What torch freed is in its cache, for its next tensors.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    import psutil

    return int(psutil.virtual_memory().available)
