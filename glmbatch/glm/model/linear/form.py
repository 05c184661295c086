"""Linear layers in the form that the device runs fastest. Knows no layers and no requests.

`plain` is torch's own product. `packed` has weights in oneDNN's order: on CPU, a few rows run at
twice the plain speed. `int8`, 8-bit products on CPU, and `fp8`, those of some GPUs, change answers
and are used only on request.

Shapes: T tokens, I features in, O features out, F size of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from glmbatch.errors import InputError
from glmbatch.glm.model.linear.fp8 import Fp8Product, gated_rows, has_fp8
from glmbatch.glm.model.linear.onednn import Int8Product, PackedProduct, has_int8, has_packed
from glmbatch.glm.model.linear.plain import PlainProduct, gated

Form = Literal["plain", "packed", "int8", "fp8"]
Product = PlainProduct | PackedProduct | Int8Product | Fp8Product
_FORMS: dict[Form, type[Product]] = {
    "plain": PlainProduct,
    "packed": PackedProduct,
    "int8": Int8Product,
    "fp8": Fp8Product,
}


def choose_form(quantization: str, device: str, dtype: str) -> Form:
    """The fastest form on `device` that keeps weights exact; or as `quantization` asks.

    Raises InputError if 8-bit products are not available, or not with `dtype`.
    """
    if quantization == "none":
        return "packed" if device == "cpu" and has_packed(dtype) else "plain"
    form: Form = "fp8" if quantization == "fp8" else "int8"
    needed = "bfloat16" if form == "fp8" else "float32"
    if not (has_fp8(device) if form == "fp8" else device == "cpu" and has_int8()):
        lacks = "exact 8-bit products"
        if form == "fp8":
            lacks = "float8 products, which need a GPU of compute capability 8.9 or later"
        raise InputError(f"{device}: has no {lacks}. Set model.quantization to none.")
    if dtype != needed:
        raise InputError(
            f"model.quantization: {form} needs {needed}, not {dtype}. "
            f"Set model.dtype to {needed} or auto."
        )
    return form


def product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, form: Form) -> Product:
    """The linear layer of a weight and bias: a call is the product, `plus` adds it to a residual.

    The residual may be overwritten. Only the plain form keeps `weight_OI` itself.
    """
    return _FORMS[form](weight_OI, bias_O)


def swiglu(gate_up_2FI: torch.Tensor, form: Form) -> Callable[[torch.Tensor], Any]:
    """The function x_TI -> silu(x @ gate.T) * (x @ up.T), [T, F] (SwiGLU, arXiv:2002.05202).

    `gate_up_2FI` has the rows of gate, then those of up. The result is for a product of that form.
    """
    if form == "fp8":
        gate_up_in_8_bits = Fp8Product(gate_up_2FI, None)
        return lambda x_TI: gated_rows(gate_up_in_8_bits(x_TI))
    if form != "packed":
        gate_up = product(gate_up_2FI, None, form)
        return lambda x_TI: gated(gate_up(x_TI))
    # Two products, so that silu is fused into one and the multiplication into the other.
    gate, up = (PackedProduct(half, None) for half in gate_up_2FI.chunk(2))
    return lambda x_TI: up.times(x_TI, gate.swish(x_TI))
