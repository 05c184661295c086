"""Turns an adapter that peft saved into one that belongs to the base checkpoint alone.

Training that continues from an adapter adds a second one, which belongs to the base with the first
merged in. No such checkpoint exists on disk, so both adapters are saved as one.

    R rank   I features in   O features out
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glmbatch.glm.checkpoint.adapter import PREFIX, Adapter, LowRank, load_adapter, read_adapter
from glmbatch.glm.checkpoint.adapter_base import note_base, sample_weights, write_config
from glmbatch.glm.checkpoint.inspection import Checkpoint, read_checkpoint
from glmbatch.glm.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, file_error, read_json


def finish_adapter(directory: Path, base: Checkpoint) -> None:
    """Make what peft saved in `directory` an adapter of the checkpoint `base` without its adapter.

    The adapter of `base`, if it has one, is combined with it, and a sample of the checkpoint's
    weights is recorded. Raises InputError or TransientError if a file cannot be written.
    """
    bare = read_checkpoint(base.path)
    try:
        if base.adapter is not None:
            _join(base.adapter, directory, base)
        # safetensors makes its file readable for the owner only; a job may run as another user.
        shutil.copymode(directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS)
        note_base(directory, bare.path, sample_weights(bare.architecture, bare.specs, bare.tensors))
    except OSError as error:
        raise file_error(directory, error) from error


def _join(first: Adapter, directory: Path, base: Checkpoint) -> None:
    """Add `first` to the adapter in `directory`; the rank of each module is the sum of both."""
    second = read_adapter(directory, base.architecture, base.layout, base.has_head)
    with_labels = replace(base.architecture, labels=second.labels or base.architecture.labels)
    added, whole = load_adapter(first, base.architecture, base.has_head)
    added_later, whole_later = load_adapter(
        second, with_labels, base.has_head or bool(second.labels)
    )
    for name, low_rank in added_later.items():
        if name in whole:  # the first adapter replaced this weight, and training continued from it
            whole[name] = low_rank.added_to(whole[name])
        else:
            added[name] = _both(added.get(name), low_rank)
    whole |= whole_later
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    ranks = {}
    for name, low_rank in added.items():
        module = name.removesuffix(".weight")
        ranks[module] = len(low_rank.a_RI)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = low_rank.a_RI
        tensors[f"{PREFIX}{module}.lora_B.weight"] = low_rank.b_OR * low_rank.scale
    config = read_json(directory / ADAPTER_CONFIG)
    config |= _sizes(ranks)
    config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in whole}) or None
    # The parts of a fused weight share their first matrix; safetensors refuses shared tensors.
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_config(directory, config)


def _both(first: LowRank | None, second: LowRank) -> LowRank:
    """The sum of two updates as one, whose rank is the sum of both ranks."""
    if first is None:
        return second
    a_RI = torch.cat([first.a_RI, second.a_RI])
    b_OR = torch.cat([first.b_OR * first.scale, second.b_OR * second.scale], dim=1)
    return LowRank(a_RI, b_OR, 1.0)


def _sizes(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The keys of an adapter's config that give each module its rank, with a scale of 1."""
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        # Full names, since the two adapters may have changed different layers.
        "target_modules": sorted(ranks),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
