"""Linear layers in the form that the device runs fastest. Knows no layers and no requests.

`plain` is torch's own product. `packed` has weights in oneDNN's order: on CPU, a few rows run at
twice the plain speed. `int8`, 8-bit products on CPU, changes answers and is used only on request.

Shapes: T tokens, I features in, O features out, F size of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from glmbatch.errors import InputError
from glmbatch.glm.model.linear.onednn import Int8Product, PackedProduct, has_int8, has_packed
from glmbatch.glm.model.linear.plain import PlainProduct, gated

Form = Literal["plain", "packed", "int8"]
Product = PlainProduct | PackedProduct | Int8Product
_FORMS: dict[Form, type[Product]] = {
    "plain": PlainProduct,
    "packed": PackedProduct,
    "int8": Int8Product,
}


def choose_form(quantization: str, device: str, dtype: str) -> Form:
    """The fastest form on `device` that keeps weights exact; "int8" if `quantization` asks for it.

    Raises InputError if 8-bit products are not available, or `dtype` is not float32 with them.
    """
    if quantization != "int8":
        return "packed" if device == "cpu" and has_packed(dtype) else "plain"
    if device != "cpu" or not has_int8():
        raise InputError(f"{device}: has no exact 8-bit products. Set model.quantization to none.")
    if dtype != "float32":
        raise InputError(
            f"model.quantization: int8 needs float32, not {dtype}. "
            "Set model.dtype to float32 or auto."
        )
    return "int8"


def product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, form: Form) -> Product:
    """The linear layer of a weight and bias: a call is the product, `plus` adds it to a residual.

    The residual may be overwritten. Only the plain form keeps `weight_OI` itself.
    """
    return _FORMS[form](weight_OI, bias_O)


def swiglu(gate_up_2FI: torch.Tensor, form: Form) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function x_TI -> silu(x @ gate.T) * (x @ up.T), [T, F] (SwiGLU, arXiv:2002.05202).

    `gate_up_2FI` has the rows of gate, then those of up.
    """
    if form != "packed":
        gate_up = product(gate_up_2FI, None, form)
        return lambda x_TI: gated(gate_up(x_TI))
    # Two products, so that silu is fused into one and the multiplication into the other.
    gate, up = (PackedProduct(half, None) for half in gate_up_2FI.chunk(2))
    return lambda x_TI: up.times(x_TI, gate.swish(x_TI))
