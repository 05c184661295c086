"""The public name of `load_job`, which `settings/jobfile.py` defines."""

from glmbatch.settings.jobfile import load_job

__all__ = ["load_job"]
