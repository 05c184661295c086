"""P-Tuning v2: learned keys and values that stand before every prompt, from the checkpoint to the running model.

    N layers   G groups   P prefix length   H kv channels   B rows   T tokens

They are not rotated, and the text's own positions still start at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from glmbatch.glm.checkpoint.architecture import Architecture
from glmbatch.glm.checkpoint.layout import PREFIX_KEY, PREFIX_KEYS, prefix_shape

# The leading arguments of both GLM classes' forward, which a caller may pass by place.
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


def native_prefix(architecture: Architecture, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """prefix_kv_N2GPH in float32 from a checkpoint's prefix tensors."""
    if PREFIX_KEY in stored:
        return stored[PREFIX_KEY]
    by_name = {key.removeprefix(PREFIX_KEYS): tensor for key, tensor in stored.items()}
    flat = by_name["embedding.weight"]
    if architecture.prefix_projection:
        hidden = torch.tanh(
            nn.functional.linear(flat, by_name["trans.0.weight"], by_name["trans.0.bias"])
        )
        flat = nn.functional.linear(hidden, by_name["trans.2.weight"], by_name["trans.2.bias"])
    layers, pair, groups, length, channels = prefix_shape(architecture)
    return flat.view(length, layers, pair, groups, channels).permute(1, 2, 3, 0, 4).contiguous()


def original_prefix(prefix_kv_N2GPH: torch.Tensor) -> torch.Tensor:
    """The published `prefix_encoder.embedding.weight` [P, N * 2 * G * H] of a prefix."""
    return prefix_kv_N2GPH.permute(3, 0, 1, 2, 4).flatten(1)


def set_prefix(model: nn.Module, prefix_kv_N2GPH: torch.Tensor | None) -> None:
    """Set `model.prefix_kv` and have the model, but not `model.model` called directly, put it before every prompt."""
    model.register_buffer(PREFIX_KEY, prefix_kv_N2GPH)
    if prefix_kv_N2GPH is not None:
        model.register_forward_pre_hook(_prepend, with_kwargs=True)


def _prepend(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    rows, length = tokens.shape[:2]
    mask_BT = call.get("attention_mask")
    cache = call.get("past_key_values")
    if mask_BT is None:
        seen = max(0, cache.get_seq_length() - model.prefix_kv.shape[3]) if cache is not None else 0
        mask_BT = torch.ones(rows, seen + length, dtype=torch.long, device=tokens.device)
    if call.get("position_ids") is None:
        call["position_ids"] = (mask_BT.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    call["past_key_values"] = _filled(model, cache, rows)
    call["attention_mask"] = torch.cat(
        (mask_BT.new_ones(rows, model.prefix_kv.shape[3]), mask_BT), dim=1
    )
    return (), call


def _filled(model: Any, cache: Any, rows: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache() if cache is None else cache
    if cache.get_seq_length() == 0:
        for layer, (key_GPH, value_GPH) in enumerate(model.prefix_kv):
            cache.update(
                key_GPH.expand(rows, -1, -1, -1), value_GPH.expand(rows, -1, -1, -1), layer
            )
    return cache
