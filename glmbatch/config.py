"""The public name of the settings classes, which `settings/` declares."""

from glmbatch.settings.job import (
    CanaryConfig,
    ClassifyStep,
    DataConfig,
    ExtractStep,
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
    "ExtractStep",
    "GenerateStep",
    "JobConfig",
    "ModelConfig",
    "ReportConfig",
    "RuntimeConfig",
]
