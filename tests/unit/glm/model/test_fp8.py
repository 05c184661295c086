"""8-bit floating-point products, on CPU by torch's own operator, and Triton's kernels for them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu

from glmbatch.errors import InputError
from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.model.linear import form
from glmbatch.glm.model.linear.form import choose_form, product, swiglu
from glmbatch.glm.model.linear.fp8 import RoundedRows, gated_rows, round_rows
from tests.unit.glm.tiny_glm import causal_model, engine_over, prompts

ROOT = Path(__file__).parents[4]
# Both factors are off by at most 1/16 each, and by 0.026 on average, which sums reduce no further.
TOLERANCE = 0.05


def filled(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def plain(rounded: RoundedRows) -> torch.Tensor:
    return (rounded.rows_ZI.float() * rounded.scales_Z1)[: rounded.tokens]


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_close_to_float32(tokens: int, has_bias: bool) -> None:
    weight, bias = filled(48, 96), filled(48, seed=1) if has_bias else None
    x, residual = filled(tokens, 96, seed=2).bfloat16(), filled(tokens, 48, seed=3).bfloat16()
    asked = product(weight.bfloat16(), None if bias is None else bias.bfloat16(), "fp8")
    expected = linear(x.float(), weight, bias)
    assert asked(x).shape == (tokens, 48)
    assert asked(x).dtype == torch.bfloat16
    assert 0 < off(asked(x), expected) < TOLERANCE
    assert off(asked.plus(x, residual), expected + residual.float()) < TOLERANCE


def test_the_gated_rows_need_no_rounding_of_their_own() -> None:
    gate_up, down, x = filled(64, 96) * 0.2, filled(48, 32, seed=4), filled(7, 96, seed=2)
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    hidden = swiglu(gate_up.bfloat16(), "fp8")(x.bfloat16())
    assert isinstance(hidden, RoundedRows)
    assert off(plain(hidden), silu(gate) * up) < 2 * TOLERANCE
    found = product(down.bfloat16(), None, "fp8")(hidden)
    assert off(found, linear(silu(gate) * up, down)) < 2 * TOLERANCE


def test_a_row_is_rounded_alike_in_any_batch() -> None:
    # Rows of other sizes beside it, as the outliers of some tokens are.
    x = (filled(40, 96) * torch.logspace(-3, 3, 40)[:, None]).bfloat16()
    together = round_rows(x)
    for row in range(40):
        alone = round_rows(x[row : row + 1])
        assert alone.scales_Z1[0].equal(together.scales_Z1[row])
        assert alone.rows_ZI[0].float().equal(together.rows_ZI[row].float())
    error = (plain(together) - x.float()).abs()
    # Half a step of three bits; the smallest numbers have a step of their own.
    assert (error <= x.float().abs() / 16 + together.scales_Z1[:40] * 2**-10).all()


def test_odd_rows_affect_no_other() -> None:
    x = filled(9, 96, seed=2)
    spoilt = x.clone()
    spoilt[3, 5], spoilt[6, 0], spoilt[7] = torch.nan, torch.inf, 0
    asked = product(filled(48, 96), None, "fp8")
    clean, dirty = asked(x), asked(spoilt)
    others = [0, 1, 2, 4, 5, 8]
    assert dirty[others].equal(clean[others])
    assert not dirty[[3, 6]].isfinite().any()
    assert not dirty[7].any()


def test_answers_are_close_to_those_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "has_fp8", lambda device: True)
    model = causal_model().bfloat16()
    rows = prompts(20)
    scores = []
    for quantization in ("none", "fp8"):
        with engine_over(model, quantization=quantization) as engine:
            labels = ((5,), (7, 8), (7, 9))
            asked = (ClassifyRequest(at, row, labels) for at, row in enumerate(rows))
            results = sorted(engine.classify(asked), key=lambda result: result.index)
            scores.append(torch.tensor([result.scores for result in results]))
            (written,) = engine.generate([GenerateRequest(0, rows[0], 5)])
            assert not written.error
    assert 0 < off(scores[1], scores[0]) < TOLERANCE


def test_fp8_is_refused_where_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cpu: has no float8 products"):
        choose_form("fp8", "cpu", "bfloat16")
    monkeypatch.setattr(form, "has_fp8", lambda device: True)
    with pytest.raises(InputError, match="fp8 needs bfloat16, not float16"):
        choose_form("fp8", "cuda:0", "float16")


INTERPRETED = """
import torch
from torch.nn.functional import silu
from glmbatch.glm.model.linear import fused
from glmbatch.glm.model.linear.fp8 import _empty, _round
torch.manual_seed(0)
for tokens, features in ((1, 32), (5, 96), (3, 1712)):
    wide = torch.randn(tokens, 2 * features).bfloat16()
    gate, up = wide.float().chunk(2, dim=-1)
    strided = wide[:, :features]
    assert (fused.swiglu(wide).float() - silu(gate) * up).norm() < 4e-3 * up.norm()
    for kernel, given, expected in (
        (fused.round_rows, strided, strided.float()),
        (fused.round_swiglu, wide, silu(gate) * up),
    ):
        rounded = _empty(tokens, features, wide.device)
        kernel(given, rounded.rows_ZI, rounded.scales_Z1)
        rows, scales = _round(expected)
        torch.testing.assert_close(rounded.scales_Z1[:tokens], scales)
        found, rows = rounded.rows_ZI[:tokens].float(), rows.float()
        assert (found == rows).float().mean() > 0.85
        # The interpreter loses the carry where a number is rounded up to a power of two.
        near = (found - rows).abs() <= rows.abs() / 8 + 2**-8
        assert (near | (found * 2 == rows)).all()
zeros = _empty(2, 32, torch.device("cpu"))
fused.round_rows(torch.zeros(2, 32).bfloat16(), zeros.rows_ZI, zeros.scales_Z1)
assert not zeros.rows_ZI[:2].float().any()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_tritons_kernels_round_as_torch_does_when_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 3, 700])
def test_cuda_rounds_as_the_cpu_does(tokens: int) -> None:
    x = filled(tokens, 2 * 13696).bfloat16()
    gate, up = x.float().chunk(2, dim=-1)
    for found, expected in (
        (round_rows(x.cuda()), round_rows(x)),
        (gated_rows(x.cuda()), round_rows(silu(gate) * up)),
    ):
        scales = expected.scales_Z1[:tokens]
        torch.testing.assert_close(found.scales_Z1[:tokens].cpu(), scales, rtol=1e-4, atol=0)
        rows = found.rows_ZI[:tokens].cpu().float()
        assert (rows == expected.rows_ZI[:tokens].float()).float().mean() > 0.98
    weight = filled(256, 2 * 13696, seed=1).bfloat16()
    found_TO = product(weight.cuda(), None, "fp8")(x.cuda()).cpu()
    # A GPU adds with fewer bits.
    assert off(found_TO, product(weight, None, "fp8")(x).float()) < 0.02
