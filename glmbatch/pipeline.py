"""A whole job in one call, under its public name; `run/` holds it."""

from glmbatch.run.job import run_job

__all__ = ["run_job"]
