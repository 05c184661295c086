"""One GLM layer over rows of tokens, its weights taken out of transformers' module. Knows no requests and no cache.

transformers' own forward states what is computed; a test holds this one to it. Here each product is one call that takes
in what stands around it, rotation is done in place, and the last layer leaves out what nobody reads.

Shapes: T tokens, R of them read, C hidden size, H query heads, G key/value groups, D head size, P rotated pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm

from glmbatch.glm.model.attention import Plan
from glmbatch.glm.model.linear import Form, product, swiglu


class Layer:
    """Takes `module`'s weights over and leaves it empty, so that two copies exist of one layer's weights at most."""

    def __init__(self, module: Any, form: Form) -> None:
        attention = module.self_attn
        self._index: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._norm = Norm(module.input_layernorm)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._heads: list[int] = [len(each.weight) // self._head_dim for each in projections]
        bias = (
            None if projections[0].bias is None else torch.cat([each.bias for each in projections])
        )
        self._query_key_value = product(
            torch.cat([each.weight for each in projections]), bias, form
        )
        self._out = product(attention.o_proj.weight, attention.o_proj.bias, form)
        self._mlp_norm = Norm(module.post_attention_layernorm)
        self._swiglu = swiglu(module.mlp.gate_up_proj.weight, form)
        self._down = product(module.mlp.down_proj.weight, None, form)
        module.self_attn = module.mlp = None

    def __call__(
        self,
        hidden_TC: torch.Tensor,
        turns_TP: torch.Tensor,
        plan: Plan,
        reads_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's answer [T, C]; with `reads_R` for those tokens alone, the others only lend keys and values."""
        projected = self._query_key_value(self._norm(hidden_TC)).view(
            len(hidden_TC), -1, self._head_dim
        )
        rotate(projected[:, : -self._heads[-1]], turns_TP)
        query_THD, key_TGD, value_TGD = torch.split(projected, self._heads, dim=1)
        if reads_R is not None:
            hidden_TC, query_THD = hidden_TC[reads_R], query_THD[reads_R]
        attended_THD = plan.attend(self._index, query_THD, key_TGD, value_TGD, self._scaling)
        hidden_TC = self._out.plus(attended_THD.flatten(1), hidden_TC)
        return self._down.plus(self._swiglu(self._mlp_norm(hidden_TC)), hidden_TC)


class Norm:
    """RMSNorm with the weight and epsilon of transformers' module."""

    def __init__(self, module: Any) -> None:
        self._weight_C, self._epsilon = module.weight, module.variance_epsilon

    def __call__(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_TC, self._weight_C.shape, self._weight_C, self._epsilon)


def turns(positions_T: torch.Tensor, inverse_frequencies_P: torch.Tensor) -> torch.Tensor:
    """The rotation [T, P] of each pair of a head at each position, as complex numbers of length 1."""
    angles_TP = positions_T[:, None] * inverse_frequencies_P
    return torch.polar(torch.ones_like(angles_TP), angles_TP)


def rotate(heads_THD: torch.Tensor, turns_TP: torch.Tensor) -> None:
    """Rotate neighbouring pairs of the first 2 P channels of each head, in place; the others carry no position."""
    tokens, heads, _ = heads_THD.shape
    pairs_THP2 = heads_THD[..., : 2 * turns_TP.shape[-1]].view(tokens, heads, -1, 2)
    if pairs_THP2.dtype == torch.float32:
        torch.view_as_complex(pairs_THP2).mul_(turns_TP[:, None])
    else:
        turned = torch.view_as_complex(pairs_THP2.float()).mul_(turns_TP[:, None])
        pairs_THP2.copy_(torch.view_as_real(turned))
