"""A GLM model's weights under transformers' names, without transformers' classes.

The engine runs the layers itself, and these classes take longer to import than all else that a
small run does before its first answer. Of the modules here, only the embedding has a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def bare_model(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    """`weights` as attributes, and the values of `config` as those of `model.config`.

    `layers.0.weight` is `model.layers.get_submodule("0").weight`.
    """
    model: Any = nn.Module()
    model.config = SimpleNamespace(**config)
    for name, tensor in weights.items():
        path, _, own = name.rpartition(".")
        _module_at(model, path).register_parameter(own, nn.Parameter(tensor, requires_grad=False))
    weight = model.model.embed_tokens.weight
    embedding = nn.Embedding.from_pretrained(weight)  # type: ignore[no-untyped-call]
    model.model.embed_tokens = embedding
    return model


def _module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; those that are missing are added."""
    module = model
    for name in path.split("."):
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module
