"""Batch classification and generation with ChatGLM2 over Parquet files or tables in memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmbatch.evaluation.compare import compare
    from glmbatch.evaluation.evaluate import evaluate
    from glmbatch.run.table import annotate, annotate_table

__version__ = "0.1.0"
__all__ = ["__version__", "annotate", "annotate_table", "compare", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import the functions at their first use, because that takes a second or more."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    measures = name in {"compare", "evaluate"}
    module = f"glmbatch.evaluation.{name}" if measures else "glmbatch.run.table"
    return getattr(import_module(module), name)
