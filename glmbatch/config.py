"""The settings under their public name; they are declared in `settings/job.py`."""

from glmbatch.settings.job import (
    ClassifyStep,
    DataConfig,
    GenerateStep,
    JobConfig,
    ModelConfig,
    RuntimeConfig,
)

__all__ = [
    "ClassifyStep",
    "DataConfig",
    "GenerateStep",
    "JobConfig",
    "ModelConfig",
    "RuntimeConfig",
]
