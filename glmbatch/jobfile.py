"""Job files under their public name; `settings/jobfile.py` reads them."""

from glmbatch.settings.jobfile import load_job

__all__ = ["load_job"]
