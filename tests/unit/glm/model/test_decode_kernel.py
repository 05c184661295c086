"""The compiled attention of decode steps equals torch's for any shape, length and values."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.model.attention import SlotLoop
from glmbatch.glm.model.kv_cache import KvShape, SlotCache
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.slot_kernel import _OPTIONS, SlotKernel, _exp
from tests.support import ROOT
from tests.unit.glm.tiny_glm import TOKENS, causal_model, engine_over

PLACES = [0, 1, 2, 3, 4, 62, 63, 64, 99]
SCALING = 0.3


def cache(groups: int, head_dim: int) -> SlotCache:
    made = SlotCache(KvShape(2, groups, head_dim, torch.float32, torch.device("cpu")), 128, 2**30)
    made.resize(len(PLACES), 128)
    random = torch.Generator().manual_seed(1)
    for tensor in made.keys_SGLD + made.values_SGLD:
        tensor.copy_(torch.randn(tensor.shape, generator=random))
    return made


def new(heads: int, groups: int, head_dim: int) -> list[torch.Tensor]:
    """Query, key and value as in a layer: views of one tensor."""
    random = torch.Generator().manual_seed(2)
    projected = torch.randn((len(PLACES), heads + 2 * groups, head_dim), generator=random)
    return list(torch.split(projected, [heads, groups, groups], dim=1))


@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 2, 16), (3, 3, 10)])
def test_the_kernel_equals_attention_by_torch(heads: int, groups: int, head_dim: int) -> None:
    ours, theirs = cache(groups, head_dim), cache(groups, head_dim)
    query, key, value = new(heads, groups, head_dim)
    for layer in range(2):
        expected = SlotLoop(theirs, PLACES).attend(layer, query, key, value, SCALING)
        attended = SlotKernel(ours, PLACES).attend(layer, query, key, value, SCALING)
        torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.keys_SGLD[layer], theirs.keys_SGLD[layer])
        assert torch.equal(ours.values_SGLD[layer], theirs.values_SGLD[layer])


@pytest.mark.parametrize(("size", "tolerance"), [(1e-30, 1e-6), (60.0, 1e-4), (1e4, 1e-2)])
def test_attention_is_accurate_for_scores_of_any_size(size: float, tolerance: float) -> None:
    query, key, value = new(8, 2, 16)
    query = query * size
    expected = SlotLoop(cache(2, 16), PLACES).attend(0, query, key, value, SCALING)
    attended = SlotKernel(cache(2, 16), PLACES).attend(0, query, key, value, SCALING)
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
def test_a_non_finite_value_affects_its_slot_only(part: int, fault: float) -> None:
    parts = new(8, 2, 16)
    sound = SlotKernel(cache(2, 16), PLACES).attend(0, *parts, SCALING)  # type: ignore[misc]
    parts[part][5, 1, 3] = fault
    expected = SlotLoop(cache(2, 16), PLACES).attend(0, *parts, SCALING)  # type: ignore[misc]
    attended = SlotKernel(cache(2, 16), PLACES).attend(0, *parts, SCALING)  # type: ignore[misc]
    assert torch.equal(attended.isfinite(), expected.isfinite())
    assert part == 1 or not attended[5].isfinite().all()  # a key may have no weight
    others = torch.arange(len(PLACES)) != 5
    assert torch.equal(attended[others], sound[others])


@pytest.mark.parametrize("installed", [True, False])
def test_without_numba_the_results_are_the_same(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "glmbatch.glm.model.slot_kernel", None)
    assert Network(causal_model(), TOKENS)._slot_plan is (SlotKernel if installed else SlotLoop)
    with engine_over(causal_model(), max_slots=3) as engine:
        requests = [GenerateRequest(index, [5 + index, 9, 17], 12) for index in range(5)]
        written = {result.index: result.ids for result in engine.generate(requests)}
    monkeypatch.undo()
    with engine_over(causal_model(), max_slots=3) as engine:
        assert written == {result.index: result.ids for result in engine.generate(requests)}


@pytest.mark.slow
def test_the_kernel_runs_without_a_cache_folder() -> None:
    code = (
        "from glmbatch.glm.model.slot_kernel import _kernel; print(_kernel(2, 4).stats.cache_path)"
    )
    environment = {
        **os.environ,
        "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("None", 0), done.stderr
