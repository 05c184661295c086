"""The compiled attention of single tokens equals torch's for any shape, length and values."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.model import rows
from glmbatch.glm.model.arena import Arena, KvShape
from glmbatch.glm.model.attention import SpanPlan
from glmbatch.glm.model.decode_kernel import _OPTIONS, KernelPlan, _exp
from glmbatch.glm.model.rows import Rows, plan_rows
from tests.support import ROOT
from tests.unit.glm.tiny_glm import causal_model, engine_over

USED = [1, 2, 3, 4, 5, 63, 64, 65, 100]
STARTS = [900, 0, 100, 800, 200, 700, 300, 600, 400]
SCALING = 0.3


def arena(groups: int, head_dim: int) -> Arena:
    """An arena in which only the places of the rows hold numbers."""
    made = Arena(KvShape(2, groups, head_dim, torch.float32, torch.device("cpu")), 1000)
    made.kv_N2GPD.fill_(torch.nan)
    random = torch.Generator().manual_seed(1)
    for start, used in zip(STARTS, USED, strict=True):
        own = made.kv_N2GPD[:, :, :, start : start + used]
        own.copy_(torch.randn(own.shape, generator=random))
    return made


def new(heads: int, groups: int, head_dim: int) -> list[torch.Tensor]:
    """Query, key and value as in a layer: views of one tensor."""
    random = torch.Generator().manual_seed(2)
    projected = torch.randn((len(USED), heads + 2 * groups, head_dim), generator=random)
    return list(torch.split(projected, [heads, groups, groups], dim=1))


def attend(
    made: Arena, parts: list[torch.Tensor], *, compiled: bool, layer: int = 0
) -> torch.Tensor:
    """The attention of one new token in each row, by the kernel or by torch."""
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(rows, "_kernel_plan", lambda: None)
        plan = plan_rows(made, Rows(STARTS, USED, [1] * len(USED), len(USED)), 0).attention
    assert isinstance(plan, KernelPlan if compiled else SpanPlan)
    return plan.attend(layer, parts[0], parts[1], parts[2], SCALING)


@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 2, 16), (3, 3, 10)])
def test_the_kernel_equals_attention_by_torch(heads: int, groups: int, head_dim: int) -> None:
    ours, theirs = arena(groups, head_dim), arena(groups, head_dim)
    parts = new(heads, groups, head_dim)
    for layer in range(2):
        expected = attend(theirs, parts, compiled=False, layer=layer)
        attended = attend(ours, parts, compiled=True, layer=layer)
        torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.kv_N2GPD.nan_to_num(7), theirs.kv_N2GPD.nan_to_num(7))


@pytest.mark.parametrize(("size", "tolerance"), [(1e-30, 1e-6), (60.0, 1e-4), (1e4, 1e-2)])
def test_attention_is_accurate_for_scores_of_any_size(size: float, tolerance: float) -> None:
    query, key, value = new(8, 2, 16)
    parts = [query * size, key, value]
    expected = attend(arena(2, 16), parts, compiled=False)
    attended = attend(arena(2, 16), parts, compiled=True)
    # A score of size s has an error of up to s * 1e-7, and so has its weight.
    torch.testing.assert_close(attended, expected, rtol=0, atol=tolerance)


def test_exp_is_accurate_to_two_units_in_the_last_place() -> None:
    def compute(x: np.ndarray) -> np.ndarray:
        exponentials = numba.njit(**_OPTIONS)(
            lambda values: np.array([_exp(value) for value in values])
        )
        return exponentials(x)  # type: ignore[no-any-return]

    x = np.concatenate([-np.geomspace(1e-9, 87, 200_000), -np.linspace(0, 87, 200_000)]).astype(
        np.float32
    )
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(compute(x) - exact) / np.spacing(exact.astype(np.float32))) <= 2
    assert compute(np.array([0, -88, -1e30, -np.inf], np.float32)).tolist() == [1, 0, 0, 0]
    assert np.isnan(compute(np.array([np.nan], np.float32)))


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_non_finite_value_affects_its_row_only(part: int, fault: float) -> None:
    parts = new(8, 2, 16)
    sound = attend(arena(2, 16), parts, compiled=True)
    parts[part][5, 1, 3] = fault
    expected = attend(arena(2, 16), parts, compiled=False)
    attended = attend(arena(2, 16), parts, compiled=True)
    assert torch.equal(attended.isfinite(), expected.isfinite())
    assert part == 1 or not attended[5].isfinite().all()  # a key may have no weight
    others = torch.arange(len(USED)) != 5
    assert torch.equal(attended[others], sound[others])


def test_without_numba_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [GenerateRequest(index, [5 + index, 9, 17], 12) for index in range(5)]
    with engine_over(causal_model(), max_slots=3) as engine:
        written = {result.index: result.ids for result in engine.generate(requests)}
    monkeypatch.setitem(sys.modules, "glmbatch.glm.model.decode_kernel", None)
    rows._kernel_plan.cache_clear()
    assert rows._kernel_plan() is None
    with engine_over(causal_model(), max_slots=3) as engine:
        assert written == {result.index: result.ids for result in engine.generate(requests)}
    monkeypatch.undo()
    rows._kernel_plan.cache_clear()


@pytest.mark.slow
def test_the_kernel_runs_without_a_cache_folder() -> None:
    module = "glmbatch.glm.model.decode_kernel"
    code = f"from {module} import _kernel; print(_kernel(2, 4).stats.cache_path)"
    environment = {
        **os.environ,
        "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("None", 0), done.stderr
