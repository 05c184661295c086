"""The public name of `run_job`, a whole job in one call, which `run/job.py` defines."""

from glmbatch.run.job import run_job

__all__ = ["run_job"]
