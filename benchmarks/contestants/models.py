"""transformers' GLM models with random weights, from a checkpoint or from a seed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification

CLASSES: dict[str, Any] = {"classifier": GlmForSequenceClassification, "causal": GlmForCausalLM}


def load_model(options: argparse.Namespace, work: dict[str, Any]) -> Any:
    """The task's model in eval mode on the device. Also sets torch's number of threads."""
    if options.threads:
        torch.set_num_threads(options.threads)
    kind = "classifier" if options.task == "classify" else "causal"
    dtype = getattr(torch, options.dtype)
    if options.checkpoint is None:
        return make_model(kind, work["config"], work["seed"], dtype, options.device)
    return CLASSES[kind].from_pretrained(options.checkpoint, dtype=dtype).to(options.device).eval()


def make_model(
    kind: str, config: dict[str, Any], seed: int, dtype: torch.dtype, device: str
) -> Any:
    """A model with random weights, reproducible for one seed, device and version of torch."""
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = CLASSES[kind](GlmConfig(**config, dtype=dtype))
    finally:
        torch.set_default_dtype(usual)
    # transformers leaves biases at zero, which would hide a format that loses them.
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.02)
    return model.requires_grad_(False).eval()


def save_model(kind: str, config: dict[str, Any], seed: int, path: Path) -> None:
    """Write a checkpoint of random float32 weights in transformers' format."""
    make_model(kind, config, seed, torch.float32, "cpu").save_pretrained(path)
