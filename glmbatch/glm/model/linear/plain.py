"""torch's own product, and the elementwise work of a layer: for CUDA, and for CPUs without packed.

On CUDA in half precision, Triton does the elementwise work in one pass, where it can compile.

Shapes: T tokens, I features in, O features out, F size of the feed-forward layer, H heads, D head
size, P rotated pairs.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear, silu

logger = logging.getLogger(__name__)


class PlainProduct:
    """torch's own product. Keeps the given weight."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x_TI @ weight_OI.T + bias_O, [T, O]."""
        return linear(x_TI, self._weight_OI, self._bias_O)

    def plus(self, x_TI: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """The product plus `residual_TO`, [T, O]."""
        out_TO = residual_TO.addmm_(x_TI, self._weight_OI.T)
        return out_TO if self._bias_O is None else out_TO.add_(self._bias_O)


def gated(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, F]; each token has its gate features, then those of up."""
    fused = fused_kernels(gate_up_T2F.device, gate_up_T2F.dtype)
    if fused is not None:
        gated_TF: torch.Tensor = fused.swiglu(gate_up_T2F)
        return gated_TF
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return silu(gate_TF).mul_(up_TF)


def rotate(heads_THD: torch.Tensor, rotary_TP: torch.Tensor) -> None:
    """Rotate adjacent pairs of the first 2P channels of each head, in place."""
    fused = fused_kernels(heads_THD.device, heads_THD.dtype)
    if fused is not None:
        fused.rotate(heads_THD, rotary_TP)
        return
    tokens, heads, _ = heads_THD.shape
    # ChatGLM2 rotates only the first half of each head; the other half carries no position.
    pairs_THP2 = heads_THD[..., : 2 * rotary_TP.shape[-1]].view(tokens, heads, -1, 2)
    if pairs_THP2.dtype == torch.float32:
        torch.view_as_complex(pairs_THP2).mul_(rotary_TP[:, None])
    else:
        # torch cannot multiply complex numbers of half precision.
        rotated = torch.view_as_complex(pairs_THP2.float()).mul_(rotary_TP[:, None])
        pairs_THP2.copy_(torch.view_as_real(rotated))


@cache
def fused_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The module `fused` if its kernels run on `device` in `dtype`, else None."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    try:
        from glmbatch.glm.model.linear import fused

        fused.swiglu(torch.ones(1, 2, dtype=dtype, device=device))
    except Exception as error:  # noqa: BLE001 - Triton's own errors, or those of its C compiler
        reason, *_ = str(error).split("\n")
        logger.warning("elementwise work is not fused, because Triton cannot compile: %s", reason)
        return None
    return fused
