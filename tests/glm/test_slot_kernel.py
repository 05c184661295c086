"""The compiled attention of slots: as torch's for any shape, length and number of threads; nothing is hidden."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from glmbatch.glm.attention import SlotLoop
from glmbatch.glm.kv_cache import KvShape, SlotCache
from glmbatch.glm.slot_kernel import SlotKernel

PLACES = [0, 1, 2, 3, 4, 62, 63, 64, 99]
SCALING = 0.3


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cache(groups: int, head_dim: int) -> SlotCache:
    made = SlotCache(KvShape(2, groups, head_dim, torch.float32, torch.device("cpu")), 128, 2**30)
    made.resize(len(PLACES), 128)
    random = torch.Generator().manual_seed(1)
    for tensor in made.keys_SGLD + made.values_SGLD:
        tensor.copy_(torch.randn(tensor.shape, generator=random))
    return made


def new(heads: int, groups: int, head_dim: int) -> list[torch.Tensor]:
    """Query, key and value as a layer has them: parts of one tensor."""
    random = torch.Generator().manual_seed(2)
    projected = torch.randn((len(PLACES), heads + 2 * groups, head_dim), generator=random)
    return list(torch.split(projected, [heads, groups, groups], dim=1))


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 2, 16), (3, 3, 10)])
def test_it_attends_and_stores_as_torch_does(heads: int, groups: int, head_dim: int, count: int) -> None:
    torch.set_num_threads(count)
    ours, theirs = cache(groups, head_dim), cache(groups, head_dim)
    query, key, value = new(heads, groups, head_dim)
    for layer in range(2):
        expected = SlotLoop(theirs, PLACES).attend(layer, query, key, value, SCALING)
        found = SlotKernel(ours, PLACES).attend(layer, query, key, value, SCALING)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.keys_SGLD[layer], theirs.keys_SGLD[layer])
        assert torch.equal(ours.values_SGLD[layer], theirs.values_SGLD[layer])


@pytest.mark.parametrize("size", [1e-30, 60.0, 1e4])
def test_weights_stay_right_from_nothing_to_one_place_taking_all(size: float) -> None:
    query, key, value = new(8, 2, 16)
    query = query * size
    expected = SlotLoop(cache(2, 16), PLACES).attend(0, query, key, value, SCALING)
    found = SlotKernel(cache(2, 16), PLACES).attend(0, query, key, value, SCALING)
    # A score of size s is right to s times 1e-7, and its weight with it.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * max(1.0, size))


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_not_finite_shows_in_its_own_slot_alone(part: int, fault: float) -> None:
    sound = SlotKernel(cache(2, 16), PLACES).attend(0, *new(8, 2, 16), SCALING)  # type: ignore[misc]
    parts = new(8, 2, 16)
    parts[part][5, 1, 3] = fault
    expected = SlotLoop(cache(2, 16), PLACES).attend(0, *parts, SCALING)  # type: ignore[misc]
    found = SlotKernel(cache(2, 16), PLACES).attend(0, *parts, SCALING)  # type: ignore[misc]
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert not found[5].isfinite().all() or part == 1  # a key of -inf takes no weight, and is no fault of the answer
    others = torch.arange(len(PLACES)) != 5
    assert torch.equal(found[others], sound[others])
