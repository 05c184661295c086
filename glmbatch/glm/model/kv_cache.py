"""Keys and values that outlive a forward: one slot for each row being written, and prefixes shared by many rows.

Knows no requests and no model; places are counted from the start of a slot.

Shapes: S slots, L places of a slot, T tokens, F places of a prefix, G key/value groups, D head size, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Attention reads whole blocks of places, so that its shapes change once in so many steps.
BLOCK = 64


def round_up(places: int) -> int:
    """`places` in whole blocks."""
    return -(-places // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class KvPrefix:
    """Keys and values that come before a row's own tokens; the first of these has position `next_position`.

    A trained prefix carries no positions: text after it still starts at 0.
    """

    kv_N2FGD: torch.Tensor
    next_position: int

    @property
    def places(self) -> int:
        return self.kv_N2FGD.shape[2]


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one place holds, and where."""

    layers: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def place_bytes(self) -> int:
        return 2 * self.layers * self.groups * self.head_dim * self.dtype.itemsize


class SlotCache:
    """For each layer, keys and values of [S, G, L, D]; empty until the first `resize`."""

    def __init__(self, shape: KvShape, max_places: int, max_bytes: int) -> None:
        self._shape = shape
        self.version = 0  # counts how often the tensors were others
        self._max_length, self._max_bytes = round_up(max_places), max_bytes
        self.drop()

    @property
    def dtype(self) -> torch.dtype:
        return self._shape.dtype

    def drop(self) -> None:
        """Give all memory back."""
        self.version += 1
        self.slots = self.length = 0
        self.keys_SGLD: list[torch.Tensor] = []
        self.values_SGLD: list[torch.Tensor] = []

    def next_length(self, places: int) -> int:
        """Length to resize to when a slot must hold `places`: at least doubled, so that copies stay rare."""
        doubled = min(self._max_length, round_up(max(places, 2 * self.length)))
        return doubled if self.slots_within(doubled) >= self.slots else round_up(places)

    def slots_within(self, length: int) -> int:
        """Slots of `length` places that the memory set aside holds; at least one."""
        return max(1, self._max_bytes // (length * self._shape.place_bytes))

    def resize(self, slots: int, length: int) -> None:
        """Become [slots, length], keeping what fits; layer by layer, so that memory peaks at one layer's copy."""
        self.version += 1
        for layer in range(self._shape.layers):
            for tensors in (self.keys_SGLD, self.values_SGLD):
                # Zeros, not empty: masked places weigh 0, and 0 times leftover garbage could be nan.
                grown = torch.zeros(
                    (slots, self._shape.groups, length, self._shape.head_dim),
                    dtype=self._shape.dtype,
                    device=self._shape.device,
                )
                if layer < len(tensors):
                    kept, places = min(slots, self.slots), min(length, self.length)
                    grown[:kept, :, :places] = tensors[layer][:kept, :, :places]
                    tensors[layer] = grown
                else:
                    tensors.append(grown)
        self.slots, self.length = slots, length

    def write(
        self,
        layer: int,
        slots_T: torch.Tensor,
        places_T: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
    ) -> None:
        """Put the keys and values of token t at place `places_T[t]` of slot `slots_T[t]`."""
        self.keys_SGLD[layer][slots_T, :, places_T] = k_TGD
        self.values_SGLD[layer][slots_T, :, places_T] = v_TGD

    def write_prefix(self, slots: Sequence[int], prefix: KvPrefix) -> None:
        """Put `prefix` at the head of each of `slots`."""
        index = torch.tensor(slots, device=self._shape.device)
        for layer, (k_FGD, v_FGD) in enumerate(prefix.kv_N2FGD):
            self.keys_SGLD[layer][index, :, : prefix.places] = k_FGD.transpose(0, 1)
            self.values_SGLD[layer][index, :, : prefix.places] = v_FGD.transpose(0, 1)

    def move(self, sources: Sequence[int], targets: Sequence[int], places: int) -> None:
        """Copy the first `places` of each slot of `sources` over the slot of `targets` beside it."""
        source = torch.tensor(sources, device=self._shape.device)
        target = torch.tensor(targets, device=self._shape.device)
        for tensors in (self.keys_SGLD, self.values_SGLD):
            for tensor in tensors:
                tensor[target, :, :places] = tensor[source, :, :places]

    def wipe(self, slots: Sequence[int]) -> None:
        """Zero `slots`: non-finite leftovers would reach their next rows through masked places."""
        for tensors in (self.keys_SGLD, self.values_SGLD):
            for tensor in tensors:
                tensor[slots] = 0
