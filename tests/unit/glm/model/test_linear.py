"""Linear layers of every form, compared with torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, silu

from glmbatch.errors import InputError
from glmbatch.glm.engine.protocol import ClassifyRequest
from glmbatch.glm.model.linear.form import Form, choose_form, product, swiglu
from tests.unit.glm.tiny_glm import engine_over, head_model, prompts

# The largest rounding error of each form, as a share of the scale of the results.
TOLERANCE: dict[Form, float] = {"plain": 1e-6, "packed": 1e-6, "int8": 0.03}
FORMS: tuple[Form, ...] = ("plain", "packed", "int8")


def filled(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(one: torch.Tensor, other: torch.Tensor, form: Form) -> None:
    assert (one - other).abs().max() <= TOLERANCE[form] * other.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 3, 64, 300])
@pytest.mark.parametrize("has_bias", [True, False])
def test_each_form_computes_the_product(form: Form, tokens: int, has_bias: bool) -> None:
    weight, bias = filled(48, 96), filled(48, seed=1) if has_bias else None
    x, residual = filled(tokens, 96, seed=2), filled(tokens, 48, seed=3)
    with torch.inference_mode():
        asked = product(weight, bias, form)
        assert_near(asked(x), linear(x, weight, bias), form)
        expected = residual + linear(x, weight, bias)
        assert_near(asked.plus(x, residual), expected, form)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_computes_swiglu(form: Form) -> None:
    weight, x = filled(64, 96) * 0.2, filled(7, 96, seed=2)
    gate, up = linear(x, weight).chunk(2, dim=-1)
    with torch.inference_mode():
        assert_near(swiglu(weight, form)(x), silu(gate) * up, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_non_finite_row_affects_no_other(form: Form) -> None:
    weight, x = filled(48, 96), filled(9, 96, seed=2)
    spoilt = x.clone()
    spoilt[3, 5], spoilt[6, 0] = torch.nan, torch.inf
    with torch.inference_mode():
        asked = product(weight, None, form)
        clean, dirty = asked(x), asked(spoilt)
    assert dirty[[0, 1, 2, 4, 5, 7, 8]].equal(clean[[0, 1, 2, 4, 5, 7, 8]])
    assert not dirty[3].isfinite().any()
    assert not dirty[6].isfinite().any()


@pytest.mark.parametrize("features", [96, 1712])
@pytest.mark.parametrize(
    ("form", "dtype"), [("packed", "float32"), ("packed", "bfloat16"), ("int8", "float32")]
)
def test_a_row_has_the_same_bits_in_any_batch(form: Form, dtype: str, features: int) -> None:
    if form not in {"int8", choose_form("none", "cpu", dtype)}:
        pytest.skip(f"no packed products in {dtype} on this processor")
    weight = filled(200, features).to(getattr(torch, dtype))
    x, residual = (filled(300, size, seed=2).to(weight.dtype) for size in (features, 200))
    with torch.inference_mode():
        asked = product(weight, None, form)
        together, summed = asked(x), asked.plus(x, residual.clone())
        for first, rows in ((0, 1), (123, 1), (9, 5), (7, 16), (200, 77)):
            part = slice(first, first + rows)
            assert asked(x[part]).equal(together[part])
            assert asked.plus(x[part], residual[part].clone()).equal(summed[part])


def test_bfloat16_swiglu_is_close_to_that_in_float32() -> None:
    form = choose_form("none", "cpu", "bfloat16")
    weight, x = filled(64, 96) * 0.2, filled(7, 96, seed=2)
    gate, up = linear(x, weight).chunk(2, dim=-1)
    with torch.inference_mode():
        found = swiglu(weight.bfloat16(), form)(x.bfloat16()).float()
    expected = silu(gate) * up
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_rows_of_zeros_stay_zero() -> None:
    with torch.inference_mode():
        assert not product(torch.zeros(8, 96), None, "int8")(filled(4, 96)).any()
        assert not product(filled(8, 96), None, "int8")(torch.zeros(4, 96)).any()


def test_int8_is_refused_where_it_is_not_supported() -> None:
    with pytest.raises(InputError, match="cuda:0: has no exact 8-bit products"):
        choose_form("int8", "cuda:0", "float32")
    with pytest.raises(InputError, match="int8 needs float32, not bfloat16"):
        choose_form("int8", "cpu", "bfloat16")


def test_int8_scores_are_close_to_float32_scores() -> None:
    rows = prompts(20)
    scores = []
    for quantization in ("none", "int8"):
        with engine_over(head_model(), quantization=quantization) as engine:
            results = engine.classify(ClassifyRequest(at, row) for at, row in enumerate(rows))
            scores.append(
                torch.tensor(
                    [result.scores for result in sorted(results, key=lambda result: result.index)]
                )
            )
    assert 0 < (scores[0] - scores[1]).abs().max() < 0.1 * scores[0].abs().max()
