"""Linear layers in the form that the device runs fastest.

Knows no layers, no attention and no requests.

`plain`: torch's own product, for CUDA and for CPUs without the others.
`packed`: weights reordered once for oneDNN, which also fuses the elementwise work around a product.
On CPU, a few rows run at twice the plain speed. In bfloat16 too, if the processor multiplies it.
`int8`: weights and activations in 8 bits, also by oneDNN, in a quarter of the memory. It changes
answers, so it is used only on request.

Shapes: T tokens, I features in, O features out, F size of the feed-forward layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch.nn.functional import linear, silu

from glmbatch.errors import InputError

logger = logging.getLogger(__name__)

Form = Literal["plain", "packed", "int8"]


class Product(Protocol):
    """A linear layer: the product with one weight, plus a bias if it has one."""

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x_TI @ weight_OI.T + bias_O, [T, O]."""

    def plus(self, x_TI: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """The product plus `residual_TO`, which may be overwritten, [T, O]."""


Swiglu = Callable[[torch.Tensor], torch.Tensor]


def choose_form(quantization: str, device: str, dtype: str) -> Form:
    """The fastest form on `device` that keeps weights exact; "int8" if `quantization` asks for it.

    Raises InputError if 8-bit products are not available, or `dtype` is not float32 with them.
    """
    on_cpu = device == "cpu"
    if quantization == "int8":
        if not on_cpu or not _has_int8():
            raise InputError(
                f"{device}: has no exact 8-bit products. Set model.quantization to none."
            )
        if dtype != "float32":
            raise InputError(
                f"model.quantization: int8 needs float32, not {dtype}. "
                "Set model.dtype to float32 or auto."
            )
        return "int8"
    return "packed" if on_cpu and _has_packed(dtype) else "plain"


def product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, form: Form) -> Product:
    """The linear layer of a weight and bias. Only the plain form keeps `weight_OI` itself."""
    return _FORMS[form](weight_OI, bias_O)


def swiglu(gate_up_2FI: torch.Tensor, form: Form) -> Swiglu:
    """The function x_TI -> silu(x @ gate.T) * (x @ up.T), [T, F] (SwiGLU, arXiv:2002.05202).

    `gate_up_2FI` has the rows of gate, then those of up.
    """
    if form != "packed":
        gate_up = product(gate_up_2FI, None, form)
        return lambda x_TI: _gated(gate_up(x_TI))
    # Two products, so that silu is fused into one and the multiplication into the other.
    gate, up = (PackedProduct(half, None) for half in gate_up_2FI.chunk(2))
    return lambda x_TI: up.times(x_TI, gate.swish(x_TI))


def _gated(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    fused = fused_kernels(gate_up_T2F.device, gate_up_T2F.dtype)
    if fused is not None:
        gated_TF: torch.Tensor = fused.swiglu(gate_up_T2F)
        return gated_TF
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return silu(gate_TF).mul_(up_TF)


@cache
def fused_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The module `fused` if its kernels run on `device` in `dtype`, else None."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    try:
        from glmbatch.glm.model import fused

        fused.swiglu(torch.ones(1, 2, dtype=dtype, device=device))
    except Exception as error:  # noqa: BLE001 - Triton's own errors, or those of its C compiler
        reason = str(error).partition("\n")[0]
        logger.warning("elementwise work is not fused, because Triton cannot compile: %s", reason)
        return None
    return fused


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


class PackedProduct:
    """oneDNN's product with a weight in its blocked layout.

    Fused elementwise steps run while the results are still in the processor's cache. A row has the
    same bits in any batch. The operators are private to torch, whose compiler emits them.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        # Without a batch size, so that the layout suits any number of rows.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
        self._bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x_TI @ weight_OI.T + bias_O, [T, O]."""
        return self._unary(x_TI, "none")

    def swish(self, x_TI: torch.Tensor) -> torch.Tensor:
        """The silu of the product, [T, O]."""
        return self._unary(x_TI, "swish")

    def plus(self, x_TI: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """The product plus `residual_TO`, [T, O]."""
        return self._binary(x_TI, residual_TO, "add")

    def times(self, x_TI: torch.Tensor, other_TO: torch.Tensor) -> torch.Tensor:
        """The product times `other_TO`, elementwise, [T, O]."""
        return self._binary(x_TI, other_TO, "mul")

    def _unary(self, x_TI: torch.Tensor, step: str) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            _paired(x_TI), self._weight, self._bias_O, step, [], ""
        )
        return out[: len(x_TI)]

    def _binary(self, x_TI: torch.Tensor, other_TO: torch.Tensor, step: str) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            _paired(x_TI), _paired(other_TO), self._weight, self._bias_O, step
        )
        return out[: len(x_TI)]


def _paired(rows: torch.Tensor) -> torch.Tensor:
    """`rows`; a single row twice, so that it gets the same bits as in any batch.

    oneDNN sums more than 1,024 features of a single row in another order. Two rows take 1.15 times
    as long in float32; in bfloat16 0.77 to 1.41 times, depending on the shape.
    """
    return rows.expand(2, -1) if len(rows) == 1 else rows


class Int8Product:
    """A product of 8-bit weights and activations, with a scale per output feature and per token.

    Sums of 8-bit products are exact, so the result of a token does not depend on its batch.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        weight_OI = weight_OI.float()
        # Symmetric quantization: the largest magnitude of a row becomes 127.
        self._scale_O = _largest(weight_OI).squeeze(-1).div_(127)
        rounded_OI = (weight_OI / self._scale_O[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded_OI, None)
        self._zeros_O = torch.zeros(len(weight_OI), dtype=torch.int64)
        self._bias_O = bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x_TI @ weight_OI.T + bias_O, with both factors in 8 bits, [T, O] in float32."""
        scale_T1 = _largest(x_TI).div_(127)
        # Unsigned, with 128 as zero: kernels for signed activations are hundreds of times slower.
        shifted_TI = (x_TI / scale_T1).add_(128.5).to(torch.uint8)
        out_TO: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted_TI,
            1.0,
            128,
            self._weight,
            self._scale_O,
            self._zeros_O,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        out_TO *= scale_T1
        return out_TO if self._bias_O is None else out_TO.add_(self._bias_O)

    def plus(self, x_TI: torch.Tensor, residual_TO: torch.Tensor) -> torch.Tensor:
        """The product plus `residual_TO`, [T, O]."""
        return self(x_TI).add_(residual_TO)


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, at least 1e-30 so that it can be a divisor."""
    lowest, highest = rows.aminmax(dim=-1, keepdim=True)
    return torch.maximum(highest, lowest.neg()).clamp_(min=1e-30)


_FORMS: dict[Form, type[PlainProduct | PackedProduct | Int8Product]] = {
    "plain": PlainProduct,
    "packed": PackedProduct,
    "int8": Int8Product,
}


@cache
def _has_packed(dtype: str) -> bool:
    """Whether this build of torch and this processor support `PackedProduct` at full speed."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype != "float32" and not (dtype == "bfloat16" and _multiplies_bfloat16()):
        return False
    # The operators are private, so they are tried once. Without them, the plain form is used.
    weight = torch.eye(4, dtype=getattr(torch, dtype))
    try:
        packed = PackedProduct(weight, None)
        gated = packed.times(weight, packed.swish(weight)).diagonal().float()
        tolerance = 1e-6 if dtype == "float32" else 1e-2
        return bool((gated - silu(torch.tensor(1.0))).abs().max() < tolerance)
    except (RuntimeError, AttributeError):
        return False


def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16.

    Without them, oneDNN converts to float32 at 0.6 times its speed.
    """
    # Private to torch: where a version lacks them, products stay plain.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


@cache
def _has_int8() -> bool:
    """Whether this build of torch supports `Int8Product` and its sums are exact.

    On processors without VNNI, the sum of two 8-bit products saturates at 16 bits.
    """
    if not _has_packed("float32"):
        return False
    try:
        # Quantized, all of these values are the largest of 8 bits, whose sums would saturate.
        full = torch.full((64, 64), 1.0)
        return bool((Int8Product(full, None)(full) - 64).abs().max() < 1e-3)
    except (RuntimeError, AttributeError):
        return False
