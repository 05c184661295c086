"""The settings under their public name; `settings/` declares them."""

from glmbatch.settings.job import (
    CanaryConfig,
    ClassifyStep,
    DataConfig,
    GenerateStep,
    JobConfig,
    ModelConfig,
    ReportConfig,
    RuntimeConfig,
)

__all__ = [
    "CanaryConfig",
    "ClassifyStep",
    "DataConfig",
    "GenerateStep",
    "JobConfig",
    "ModelConfig",
    "ReportConfig",
    "RuntimeConfig",
]
