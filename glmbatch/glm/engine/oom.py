"""What counts as "the device is out of memory", and how to go on after it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# torch has its own error class only for CUDA; the CPU allocator and cuBLAS raise a bare
# RuntimeError.
_OOM_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def catch_oom(work: Callable[[], Result]) -> Result | None:
    """The result of `work`, or None when the device runs out of memory.

    `work` must be safe to repeat.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("out of memory: %s", str(error).partition("\n")[0])
    # The traceback keeps the failed forward's tensors alive; outside the handler it is gone.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(message in str(error) for message in _OOM_MESSAGES)
