"""One GLM layer over a batch of tokens, with the weights of transformers' module.

Knows no requests and no cache. A test checks that it computes what transformers' forward does. It
is faster: query, key and value share one product, and elementwise work is fused into products.
Rotation is in place, and the last layer computes only the tokens whose states are read.

Shapes: T tokens, R of them read, C hidden size, H query heads, G key/value groups, D head size,
P rotated pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm

from glmbatch.glm.model.attention import AttentionPlan
from glmbatch.glm.model.linear.form import Form, product, swiglu
from glmbatch.glm.model.linear.plain import rotate


class Layer:
    """Attention and feed-forward of one layer.

    Takes over the weights of `module`, with the names of a `GlmDecoderLayer`, and empties it, so
    that at most one layer is in memory twice.
    """

    def __init__(self, module: Any, index: int, config: Any, form: Form) -> None:
        attention = module.self_attn
        self._index = index
        self._head_dim: int = config.head_dim
        self._scaling: float = config.head_dim**-0.5
        self._norm = Norm(module.input_layernorm, config)
        # One product for query, key and value: three smaller ones read the input three times.
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = [projection.weight for projection in projections]
        self._heads: list[int] = [len(weight) // self._head_dim for weight in weights]
        bias = None
        if config.attention_bias:
            bias = torch.cat([projection.bias for projection in projections])
        self._query_key_value = product(torch.cat(weights), bias, form)
        self._out = product(attention.o_proj.weight, None, form)
        self._mlp_norm = Norm(module.post_attention_layernorm, config)
        self._swiglu = swiglu(module.mlp.gate_up_proj.weight, form)
        self._down = product(module.mlp.down_proj.weight, None, form)
        module.self_attn = None
        module.mlp = None

    def __call__(
        self,
        hidden_TC: torch.Tensor,
        rotary_TP: torch.Tensor,
        plan: AttentionPlan,
        reads_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's output [T, C], or [R, C] for the tokens `reads_R`.

        With `reads_R`, the other tokens only provide keys and values. `rotary_TP` comes from
        `rotary_factors`.
        """
        projected = self._query_key_value(self._norm(hidden_TC))
        heads_THD = projected.view(hidden_TC.shape[0], -1, self._head_dim)
        values = self._heads[-1]  # the last heads are the values, which are not rotated
        rotate(heads_THD[:, :-values], rotary_TP)
        query_THD, key_TGD, value_TGD = heads_THD.split_with_sizes(self._heads, dim=1)
        if reads_R is not None:
            hidden_TC = hidden_TC[reads_R]
            query_THD = query_THD[reads_R]
        attended_THD = plan.attend(self._index, query_THD, key_TGD, value_TGD, self._scaling)
        hidden_TC = self._out.plus(attended_THD.flatten(1), hidden_TC)
        return self._down.plus(self._swiglu(self._mlp_norm(hidden_TC)), hidden_TC)


class Norm:
    """RMSNorm with the module's weight and the config's epsilon."""

    def __init__(self, module: Any, config: Any) -> None:
        self._weight_C = module.weight
        self._epsilon: float = config.rms_norm_eps

    def __call__(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """`hidden_TC`, normalized, [T, C]."""
        return rms_norm(hidden_TC, self._weight_C.shape, self._weight_C, self._epsilon)


def inverse_frequencies(config: Any) -> torch.Tensor:
    """The angle [P] per position of each rotated pair, in radians and in float32."""
    rope = config.rope_parameters
    rotated = int(config.head_dim * rope["partial_rotary_factor"])
    exponents_P = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    theta: float = rope["rope_theta"]
    factor: float = rope.get("factor", 1.0)
    return 1.0 / theta**exponents_P / factor


def rotary_factors(positions_T: torch.Tensor, inverse_frequencies_P: torch.Tensor) -> torch.Tensor:
    """The rotations [T, P] of all pairs at the given positions, as complex numbers of length 1.

    Rotary position embedding, arXiv:2104.09864. `inverse_frequencies_P` is in radians per position.
    """
    angles_TP = positions_T[:, None] * inverse_frequencies_P
    return torch.polar(torch.ones_like(angles_TP), angles_TP)
