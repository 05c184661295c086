"""The slot cache keeps its contents when it grows and moves slots, and its memory is limited."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.glm.model.kv_cache import BLOCK, KvPrefix, KvShape, SlotCache, round_up

SHAPE = KvShape(layers=2, groups=2, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))
PLACE_BYTES = 2 * 2 * 2 * 4 * 4


def filled(slots: int = 3, length: int = 64) -> SlotCache:
    """A cache in which every number encodes its layer, slot and place."""
    cache = SlotCache(SHAPE, max_places=1000, max_bytes=PLACE_BYTES * 64 * 8)
    cache.resize(slots, length)
    owners = torch.arange(slots).repeat_interleave(length)
    places = torch.arange(length).repeat(slots)
    for layer in range(2):
        numbers = (layer * 10_000 + owners * 1_000 + places)[:, None, None].expand(-1, 2, 4).float()
        cache.write(layer, owners, places, numbers, -numbers)
    return cache


def row(cache: SlotCache, slot: int, places: int) -> list[float]:
    keys, values = cache.keys_SGLD[1][slot, :, :places], cache.values_SGLD[1][slot, :, :places]
    assert torch.equal(keys, -values)
    assert (keys == keys[:1, :, :1]).all()
    return keys[0, :, 0].tolist()


def expected(slot: int, places: int) -> list[float]:
    return [10_000 + slot * 1_000 + place for place in range(places)]


def test_growing_the_cache_keeps_its_contents() -> None:
    cache = filled()
    cache.resize(5, 128)
    assert [row(cache, slot, 64) for slot in range(3)] == [expected(slot, 64) for slot in range(3)]
    assert not cache.keys_SGLD[1][3:].any()
    assert not cache.keys_SGLD[1][:, :, 64:].any()


def test_shrinking_keeps_the_first_slots() -> None:
    cache = filled()
    cache.resize(2, 128)
    assert [row(cache, slot, 64) for slot in range(2)] == [expected(slot, 64) for slot in range(2)]


def test_moved_slots_overwrite_their_targets() -> None:
    cache = filled(slots=4)
    cache.move([3, 2], [0, 1], 50)
    assert row(cache, 0, 50) == expected(3, 50)
    assert row(cache, 1, 50) == expected(2, 50)


def test_a_wiped_slot_is_all_zeros() -> None:
    cache = filled()
    cache.wipe([1])
    assert row(cache, 1, 64) == [0.0] * 64
    assert row(cache, 2, 64) == expected(2, 64)


def test_a_prefix_is_written_to_its_slots_only() -> None:
    cache = filled()
    prefix = KvPrefix(torch.full((2, 2, 5, 2, 4), 7.0), next_position=0)
    cache.write_prefix([0, 2], prefix)
    for slot in (0, 2):
        assert cache.values_SGLD[0][slot, :, :5].eq(7).all()
        assert cache.keys_SGLD[1][slot, 0, 5:, 0].tolist() == expected(slot, 64)[5:]
    assert row(cache, 1, 64) == expected(1, 64)


def test_dropping_frees_all_memory() -> None:
    cache = filled()
    cache.drop()
    assert (cache.slots, cache.length, cache.keys_SGLD, cache.values_SGLD) == (0, 0, [], [])


@given(
    places=st.integers(1, 1000),
    slots=st.integers(1, 8),
    length=st.integers(1, 8).map(lambda blocks: blocks * BLOCK),
)
def test_the_next_length_fits_the_places_and_memory(places: int, slots: int, length: int) -> None:
    cache = SlotCache(SHAPE, max_places=1000, max_bytes=PLACE_BYTES * 64 * 8)
    cache.slots, cache.length = slots, length
    longer = cache.next_length(places)
    assert longer >= places
    assert longer % BLOCK == 0
    assert longer <= round_up(1000)
    allowed = cache.slots_within(longer)
    assert allowed == 1 or allowed * longer * PLACE_BYTES <= PLACE_BYTES * 64 * 8
    # No slot is lost for places that are not needed yet.
    assert allowed >= min(slots, cache.slots_within(round_up(places)))


@pytest.mark.parametrize("places", [1, 64, 65])
def test_places_are_rounded_up_to_whole_blocks(places: int) -> None:
    assert round_up(places) == (64 if places <= 64 else 128)
