"""An arena keeps what each row wrote in its own places."""

from __future__ import annotations

import torch

from glmbatch.glm.model.arena import Arena, ArenaKeys, KvPrefix, KvShape

SHAPE = KvShape(layers=2, groups=2, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))


def filled(places: int = 30) -> Arena:
    """An arena in which every number encodes its layer and place."""
    arena = Arena(SHAPE, places)
    for layer in range(2):
        numbers = (layer * 1000 + torch.arange(places))[:, None, None].expand(-1, 2, 4).float()
        ArenaKeys(arena, torch.arange(places)).put(layer, numbers, -numbers)
    return arena


def test_a_place_holds_the_token_that_was_put_there() -> None:
    arena = Arena(SHAPE, 10)
    key = torch.randn(3, 2, 4)
    keys, values = ArenaKeys(arena, torch.tensor([7, 0, 4])).put(1, key, -key)
    assert torch.equal(keys[:, 7], key[0])
    assert torch.equal(values[:, 4], -key[2])
    assert keys.data_ptr() == arena.layer(1)[0].data_ptr()


def test_copied_places_are_the_same_in_all_layers() -> None:
    arena = filled()
    arena.copy(3, 20, 5)
    for layer in range(2):
        keys, values = arena.layer(layer)
        assert keys[0, 20:25, 0].tolist() == [layer * 1000 + place for place in range(3, 8)]
        assert values[1, 19:21, 3].tolist() == [-layer * 1000 - 19, -layer * 1000 - 3]


def test_a_prefix_is_written_to_its_places_only() -> None:
    arena = filled()
    arena.write_prefix(10, KvPrefix(torch.full((2, 2, 2, 5, 4), 7.0), next_position=0))
    keys = arena.layer(1)[0][0, :, 0]
    assert keys[9:16].tolist() == [1009, 7, 7, 7, 7, 7, 1015]


def test_the_layers_of_a_scratch_arena_share_memory() -> None:
    arena = Arena(SHAPE, 10, one_layer=True)
    assert arena.layer(0)[1].data_ptr() == arena.layer(1)[1].data_ptr()
    assert arena.kv_N2GPD.numel() == 2 * 2 * 10 * 4


def test_a_prefix_is_put_before_each_row() -> None:
    arena = Arena(SHAPE, 12, one_layer=True)
    prefix = KvPrefix(torch.randn(2, 2, 2, 3, 4), next_position=3)
    before = torch.tensor([[0, 1, 2], [6, 7, 8]])
    store = ArenaKeys(arena, torch.tensor([3, 9]), prefix, before)
    key = torch.randn(2, 2, 4)
    keys, values = store.put(1, key, key)
    for row in before:
        assert torch.equal(keys[:, row], prefix.kv_N2GFD[1, 0])
        assert torch.equal(values[:, row], prefix.kv_N2GFD[1, 1])
