"""Training runs that stop before their evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.finetune import begin, train_run


def trained(config: TuneConfig) -> Path:
    """The folder of a run that is trained but not evaluated."""
    run = begin(config)
    train_run(config, run)
    return Path(run)


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a run's checkpoint."""
    return load_file(Path(run) / "checkpoint" / "model.safetensors")
