"""Converts a P-Tuning v2 prefix, learned keys and values before every prompt, between layouts.

    N layers   G groups   P prefix length   H kv channels

The keys are not rotated, and the positions of the text still start at 0.
See https://arxiv.org/abs/2110.07602.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import linear

from glmbatch.glm.checkpoint.architecture import Architecture
from glmbatch.glm.checkpoint.layout import PREFIX_KEY, PREFIX_KEYS, prefix_shape


def native_prefix(architecture: Architecture, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """prefix_kv_N2GPH from a checkpoint's prefix tensors in float32, in either layout."""
    if PREFIX_KEY in stored:
        return stored[PREFIX_KEY]
    by_name = {key.removeprefix(PREFIX_KEYS): tensor for key, tensor in stored.items()}
    # The projection only serves training: applied once, it yields the keys and values.
    flat = by_name["embedding.weight"]
    if architecture.prefix_projection:
        hidden = linear(flat, by_name["trans.0.weight"], by_name["trans.0.bias"]).tanh()
        flat = linear(hidden, by_name["trans.2.weight"], by_name["trans.2.bias"])
    layers, pair, groups, length, channels = prefix_shape(architecture)
    prefix_PN2GH = flat.view(length, layers, pair, groups, channels)
    return prefix_PN2GH.permute(1, 2, 3, 0, 4).contiguous()


def original_prefix(prefix_kv_N2GPH: torch.Tensor) -> torch.Tensor:
    """A prefix as the published `prefix_encoder.embedding.weight` [P, N * 2 * G * H]."""
    return prefix_kv_N2GPH.permute(3, 0, 1, 2, 4).flatten(1)
