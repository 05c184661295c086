"""Elementwise work of a layer in one pass over memory each, by Triton: CUDA alone.

torch passes twice over the tensors of SwiGLU and four times over those of the rotation. Each kernel
computes in float32 and rounds once. Importing this module imports Triton, which compiles a kernel
at its first use and needs a C compiler for that. Knows no requests.

Shapes: T tokens, Z tokens rounded up, I features, F size of the feed-forward layer, H heads, D head
size, P rotated pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Triton reads the annotations of a kernel, so its arguments have none: they are addresses, strides
# and sizes.

# Features of one token that one program computes.
BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_kernel(gate_up, out, features, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    exists = feature < features
    gate_at = gate_up + token * 2 * features + feature
    gate = tl.load(gate_at, mask=exists).to(tl.float32)
    up = tl.load(gate_at + features, mask=exists).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + token * features + feature, gated.to(out.dtype.element_ty), mask=exists)


def swiglu(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, F]; each token of `gate_up_T2F` has its gate features, then its up."""
    tokens, features = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = gate_up_T2F.new_empty(tokens, features)
    grid = (tokens, triton.cdiv(features, BLOCK))
    _swiglu_kernel[grid](gate_up_T2F, out_TF, features, block=BLOCK)
    return out_TF


@triton.jit
def _store_rounded(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    x, row, feature, features, rows, scales
):
    # A row of zeros is divided by something too. 448 is the largest number of float8_e4m3fn.
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30) / 448
    tl.store(scales + row, scale)
    at = rows + row * features + feature
    tl.store(at, (x / scale).to(rows.dtype.element_ty), mask=feature < features)


@triton.jit  # type: ignore[untyped-decorator]
def _round_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    x, rows, scales, row_stride, features, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, block)
    loaded = tl.load(x + row * row_stride + feature, mask=feature < features, other=0)
    _store_rounded(loaded.to(tl.float32), row, feature, features, rows, scales)


def round_rows(x_TI: torch.Tensor, rows_ZI: torch.Tensor, scales_Z1: torch.Tensor) -> None:
    """Write each row of `x_TI`, divided by its scale, as float8 and its scale."""
    tokens, features = x_TI.shape
    assert x_TI.stride(1) == 1
    block = triton.next_power_of_2(features)
    _round_kernel[(tokens,)](
        x_TI, rows_ZI, scales_Z1, x_TI.stride(0), features, block=block, num_warps=_warps(block)
    )


@triton.jit  # type: ignore[untyped-decorator]
def _round_swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up, rows, scales, features, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, block)
    exists = feature < features
    gate_at = gate_up + token * 2 * features + feature
    gate = tl.load(gate_at, mask=exists, other=0).to(tl.float32)
    up = tl.load(gate_at + features, mask=exists, other=0).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * up
    _store_rounded(gated, token, feature, features, rows, scales)


def round_swiglu(gate_up_T2F: torch.Tensor, rows_ZF: torch.Tensor, scales_Z1: torch.Tensor) -> None:
    """Write `swiglu` of each token as `round_rows` does: a program has a whole row in registers."""
    tokens, features = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    block = triton.next_power_of_2(features)
    _round_swiglu_kernel[(tokens,)](
        gate_up_T2F, rows_ZF, scales_Z1, features, block=block, num_warps=_warps(block)
    )


def _warps(block: int) -> int:
    # At most 32 values of a row for each thread.
    return max(1, min(16, block // 1024))


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    heads_THD,
    factors_TP2,
    token_stride,
    head_stride,
    heads,
    padded_heads: tl.constexpr,
    pairs: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, pairs)
    cos = tl.load(factors_TP2 + token * 2 * pairs + 2 * pair)[None, :]
    sin = tl.load(factors_TP2 + token * 2 * pairs + 2 * pair + 1)[None, :]
    head = tl.arange(0, padded_heads)
    exists = (head < heads)[:, None]
    at = heads_THD + token * token_stride + head[:, None] * head_stride
    at += tl.arange(0, 2 * pairs)[None, :]
    x = tl.load(at, mask=exists, other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (padded_heads, pairs, 2)))
    rotated = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    rotated = tl.reshape(rotated, (padded_heads, 2 * pairs))
    tl.store(at, rotated.to(heads_THD.dtype.element_ty), mask=exists)


def rotate(heads_THD: torch.Tensor, rotary_TP: torch.Tensor) -> None:
    """Rotate adjacent pairs of the first 2P channels of each head, in place.

    `rotary_TP` is complex64, and P is a power of two.
    """
    tokens, heads, _ = heads_THD.shape
    assert heads_THD.stride(2) == 1
    _rotate_kernel[(tokens,)](
        heads_THD,
        torch.view_as_real(rotary_TP),
        heads_THD.stride(0),
        heads_THD.stride(1),
        heads,
        padded_heads=triton.next_power_of_2(heads),
        pairs=rotary_TP.shape[1],
    )
