"""Products of oneDNN on CPU: with packed weights, or in 8 bits, which changes answers.

The operators are private to torch, whose compiler emits them.

Shapes: T tokens, I features in, O features out.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import silu

# One or two rows take longer than four: all products of a decode step 11 ms and 7.5 ms, in float32,
# and 1.3 to 1.7 times as long in bfloat16. A single row would also get other bits than in a batch,
# since oneDNN sums more than 1,024 of its features in another order.
FEWEST_ROWS = 4


class PackedProduct:
    """oneDNN's product with a weight in its blocked layout.

    Fused elementwise steps run while the results are still in the processor's cache. A row has the
    same bits in any batch.
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
        rows = x_TI.shape[0]
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            _repeated(x_TI), self._weight, self._bias_O, step, [], ""
        )
        return out[:rows]

    def _binary(self, x_TI: torch.Tensor, other_TO: torch.Tensor, step: str) -> torch.Tensor:
        rows = x_TI.shape[0]
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            _repeated(x_TI), _repeated(other_TO), self._weight, self._bias_O, step
        )
        return out[:rows]


def _repeated(x: torch.Tensor) -> torch.Tensor:
    """`x`, with its rows repeated if there are fewer than `FEWEST_ROWS`."""
    rows = x.shape[0]  # `len` takes eight times as long
    return x if rows >= FEWEST_ROWS else x.repeat(-(-FEWEST_ROWS // rows), 1)


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
        x, weight = (shifted_TI, 1.0, 128), (self._weight, self._scale_O, self._zeros_O)
        out_TO: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *x, *weight, None, 1.0, 0, torch.float32, "none", [], ""
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


@cache
def has_packed(dtype: str) -> bool:
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
def has_int8() -> bool:
    """Whether this build of torch supports `Int8Product` and its sums are exact.

    On processors without VNNI, the sum of two 8-bit products saturates at 16 bits.
    """
    if not has_packed("float32"):
        return False
    try:
        # Quantized, all of these values are the largest of 8 bits, whose sums would saturate.
        full = torch.full((64, 64), 1.0)
        return bool((Int8Product(full, None)(full) - 64).abs().max() < 1e-3)
    except (RuntimeError, AttributeError):
        return False
