"""Recognizes that the device is out of memory, and recovers from it; or that it is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from glmbatch.errors import DeviceLost

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# torch has an error class only for CUDA; the CPU allocator and cuBLAS raise a bare RuntimeError.
_OOM_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS allocates when a thread first uses it
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # the end of two of cuDNN 9's errors
    "CUDA error: out of memory",
)


def catch_oom(work: Callable[[], Result]) -> Result | None:
    """The result of `work`, or None if the device runs out of memory.

    Frees torch's cached CUDA memory before it returns None. `work` must be safe to repeat.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("out of memory: %s", str(error).partition("\n")[0])
    # Outside the handler, because the traceback would keep the failed forward's tensors alive.
    empty_cache()
    return None


def empty_cache() -> None:
    """Return the CUDA memory that torch has cached, in blocks too small for the next tensor."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that the device or the machine is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(message in str(error) for message in _OOM_MESSAGES)


def device_lost(error: BaseException, device: torch.device) -> DeviceLost | None:
    """The error to raise if, after `error`, this process can no longer use `device`; else None.

    CUDA repeats an error such as an illegal memory access at every later call of the process.
    """
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, torch.AcceleratorError) and not _fails(device):
        return None
    reason = str(error).partition("\n")[0]
    return DeviceLost(f"the GPU failed: {reason}. Only a new process can use it again: run again.")


def _fails(device: torch.device) -> bool:
    """Whether even waiting for `device` fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
