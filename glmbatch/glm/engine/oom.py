"""What counts as "the device is full", and how to go on after it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# torch has an error class of its own for CUDA only; the CPU allocator and cuBLAS raise a bare RuntimeError.
_MARKS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def within_memory(work: Callable[[], Result]) -> Result | None:
    """What `work` returns, or None when the device has no room for it. `work` must be safe to repeat."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("out of memory: %s", str(error).partition("\n")[0])
    # Only here, outside the handler, is the traceback gone that kept the failed forward's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)
