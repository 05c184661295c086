"""8-bit floating-point products of GPUs from Ada and Hopper on. They change answers.

A row is divided by a scale of its own, so that its largest magnitude is that of float8, and
rounded. Weights are rounded once. Triton rounds activations in one pass, where it can compile;
elsewhere torch does. The product is private to torch; a test holds what is asked of it.

Shapes: T tokens, Z tokens rounded up, I features in, O features out, F size of the feed-forward
layer.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from glmbatch.glm.model.linear.plain import fused_kernels, gated

FP8 = torch.float8_e4m3fn
# The number of rows of a product is a multiple of this; torch asks it of the other sizes.
ROWS = 16


class RoundedRows(NamedTuple):
    """Rows of float8 and their scales; behind the `tokens` rows, whatever was in memory."""

    rows_ZI: torch.Tensor
    scales_Z1: torch.Tensor
    tokens: int


class Fp8Product:
    """A product of 8-bit weights and activations, with a scale per output feature and per token.

    How a token is rounded does not depend on its batch.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight_OI, scales_O1 = _round(weight_OI)
        self._scales_1O = scales_O1.T.contiguous()
        self._bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor | RoundedRows) -> torch.Tensor:
        """x_TI @ weight_OI.T + bias_O, with both factors in 8 bits, [T, O] in bfloat16."""
        x = x_TI if isinstance(x_TI, RoundedRows) else round_rows(x_TI)
        out_ZO = torch._scaled_mm(
            x.rows_ZI,
            self._weight_OI.T,
            scale_a=x.scales_Z1,
            scale_b=self._scales_1O,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        out_TO = out_ZO[: x.tokens]
        return out_TO if self._bias_O is None else out_TO.add_(self._bias_O)

    def plus(self, x_TI: torch.Tensor | RoundedRows, residual_TO: torch.Tensor) -> torch.Tensor:
        """The product plus `residual_TO`, [T, O]."""
        return self(x_TI).add_(residual_TO)


def round_rows(x_TI: torch.Tensor) -> RoundedRows:
    """Each row of `x_TI` in 8 bits."""
    rounded = _empty(len(x_TI), x_TI.shape[1], x_TI.device)
    fused = fused_kernels(x_TI.device, x_TI.dtype)
    if fused is not None:
        fused.round_rows(x_TI, rounded.rows_ZI, rounded.scales_Z1)
    else:
        rows_TI, scales_T1 = _round(x_TI)
        rounded.rows_ZI[: len(x_TI)] = rows_TI
        rounded.scales_Z1[: len(x_TI)] = scales_T1
    return rounded


def gated_rows(gate_up_T2F: torch.Tensor) -> RoundedRows:
    """silu(gate) * up in 8 bits; each token has its gate features, then those of up."""
    fused = fused_kernels(gate_up_T2F.device, gate_up_T2F.dtype)
    if fused is None:
        return round_rows(gated(gate_up_T2F))
    rounded = _empty(len(gate_up_T2F), gate_up_T2F.shape[1] // 2, gate_up_T2F.device)
    fused.round_swiglu(gate_up_T2F, rounded.rows_ZI, rounded.scales_Z1)
    return rounded


def _empty(tokens: int, features: int, device: torch.device) -> RoundedRows:
    rows = -(-tokens // ROWS) * ROWS
    return RoundedRows(
        torch.empty(rows, features, dtype=FP8, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
        tokens,
    )


def _round(rows_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows_TI = rows_TI.float()
    # Not zero, because it is a divisor.
    scales_T1 = rows_TI.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30).div_(448)
    return (rows_TI / scales_T1).to(FP8), scales_T1


@cache
def has_fp8(device: str) -> bool:
    """Whether `device` multiplies float8, by this build of torch."""
    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(128, 128, dtype=torch.bfloat16, device=device)
    try:
        with torch.cuda.device(device):  # Triton runs on the current one
            return bool((Fp8Product(ones, None)(ones) == 128).all())
    except (RuntimeError, AttributeError):
        return False
