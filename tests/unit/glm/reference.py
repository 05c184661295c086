"""A reference forward of ChatGLM2 for one sequence, in plain torch over the published tensors.

Shares no code with the code under test.

T tokens   D hidden   H heads   G groups   C channels of a head   P prefix length   S = P + T
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import linear, silu


def reference_logits(
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    ids: Sequence[int],
) -> torch.Tensor:
    """Logits in float32: [T, V] of a language model, [L] of a classifier."""
    heads, channels, layers = (
        config["num_attention_heads"],
        config["kv_channels"],
        config["num_layers"],
    )
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    prefix_PNGC = _prefix(state, config, groups)
    x_TD = state["transformer.embedding.word_embeddings.weight"].float()[list(ids)]
    for layer in range(layers):
        weight = LayerWeights(
            state, f"transformer.encoder.layers.{layer}.", config.get("quantization_bit") or 0
        )
        normed_TD = _norm(x_TD, weight("input_layernorm.weight"), config)
        qkv = linear(normed_TD, weight("self_attention.query_key_value.weight"))
        if config["add_qkv_bias"]:
            qkv = qkv + weight("self_attention.query_key_value.bias")
        if config["multi_query_attention"]:
            q, k, v = qkv.split([heads * channels, groups * channels, groups * channels], dim=-1)
        else:
            q, k, v = qkv.view(len(ids), heads, 3 * channels).chunk(3, dim=-1)
        q, k, v = (part.reshape(len(ids), -1, channels) for part in (q, k, v))
        q, k = _rotate(q, config), _rotate(k, config)
        k, v = (
            torch.cat((prefix_PNGC[:, 2 * layer], k)),
            torch.cat((prefix_PNGC[:, 2 * layer + 1], v)),
        )
        attended = torch.cat(
            [
                _attend(q[:, h], k[:, h * groups // heads], v[:, h * groups // heads])
                for h in range(heads)
            ],
            1,
        )
        x_TD = x_TD + linear(attended, weight("self_attention.dense.weight"))
        normed_TD = _norm(x_TD, weight("post_attention_layernorm.weight"), config)
        gate, up = linear(normed_TD, weight("mlp.dense_h_to_4h.weight")).chunk(2, dim=-1)
        x_TD = x_TD + linear(silu(gate) * up, weight("mlp.dense_4h_to_h.weight"))
    x_TD = _norm(x_TD, state["transformer.encoder.final_layernorm.weight"].float(), config)
    if "classifier_head.weight" in state:
        return linear(
            x_TD[-1], state["classifier_head.weight"].float(), state["classifier_head.bias"].float()
        )
    return linear(x_TD, state["transformer.output_layer.weight"].float())


def _norm(x: torch.Tensor, weight: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"]).sqrt() * weight


def _rotate(x_TGC: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Rotate adjacent pairs of the first half of each head's channels; the other half stays."""
    ratio, half = config.get("rope_ratio", 1), config["kv_channels"] // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    positions = torch.arange(len(x_TGC), dtype=torch.float64) / ratio
    angles = torch.outer(positions, frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(
        x_TGC[..., :half].double().unflatten(-1, (half // 2, 2)).contiguous()
    )
    return torch.cat(
        (torch.view_as_real(pairs * turns).flatten(-2).float(), x_TGC[..., half:]), dim=-1
    )


def _attend(q_TC: torch.Tensor, k_SC: torch.Tensor, v_SC: torch.Tensor) -> torch.Tensor:
    scores_TS = q_TC @ k_SC.T / q_TC.shape[1] ** 0.5
    before = k_SC.shape[0] - q_TC.shape[0]
    visible = torch.arange(k_SC.shape[0])[None] <= torch.arange(q_TC.shape[0])[:, None] + before
    return scores_TS.masked_fill(~visible, float("-inf")).softmax(-1) @ v_SC


def _prefix(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], groups: int
) -> torch.Tensor:
    """[P, 2 x layers, G, C]: key of layer i at 2i, value at 2i + 1."""
    name, length = "transformer.prefix_encoder.", config.get("pre_seq_len") or 0
    flat = state[f"{name}embedding.weight"].float() if length else torch.zeros(0)
    if config.get("prefix_projection"):
        hidden = linear(
            flat, state[f"{name}trans.0.weight"].float(), state[f"{name}trans.0.bias"].float()
        ).tanh()
        flat = linear(
            hidden, state[f"{name}trans.2.weight"].float(), state[f"{name}trans.2.bias"].float()
        )
    return flat.view(length, 2 * config["num_layers"], groups, config["kv_channels"])


class LayerWeights:
    """Weights of one layer by name, with int8 and int4 dequantized to float32."""

    def __init__(self, state: Mapping[str, torch.Tensor], layer: str, bits: int) -> None:
        self.state, self.layer, self.bits = state, layer, bits

    def __call__(self, name: str) -> torch.Tensor:
        tensor = self.state[self.layer + name]
        if tensor.dtype != torch.int8:
            return tensor.float()
        if self.bits == 4:
            unsigned = tensor.int() & 255
            columns = torch.stack((unsigned // 16, unsigned % 16), dim=2).flatten(1)
            tensor = torch.where(columns > 7, columns - 16, columns)
        return tensor.float() * self.state[f"{self.layer}{name}_scale"].float()[:, None]
