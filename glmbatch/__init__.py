"""Batch classification and generation with ChatGLM2 over Parquet files."""

__version__ = "0.1.0"
