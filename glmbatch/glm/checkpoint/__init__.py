"""Checkpoints and LoRA adapters: inspecting, loading and saving them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmbatch.glm.checkpoint.load import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import `load_model` on first use, because importing it loads torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from glmbatch.glm.checkpoint import load

    return getattr(load, name)
