"""The KV cache: keys and values of generated sequences, one slot each, and of shared prefixes.

A place is the index of a token in its slot. It differs from the position behind a trained prefix,
which takes places but no positions. Knows no requests and no model.

Shapes: S slots, L places of a slot, T tokens, F places of a prefix, G key/value groups, D head
size, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Attention reads whole blocks of places, so that its shapes change only once in 64 decode steps.
BLOCK = 64


def round_up(places: int) -> int:
    """`places` rounded up to a multiple of BLOCK."""
    return -(-places // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class KvPrefix:
    """Keys and values that precede a sequence's own tokens, which start at `next_position`.

    A trained prefix has no positions: the text after it still starts at 0.
    """

    kv_N2FGD: torch.Tensor
    next_position: int

    @property
    def places(self) -> int:
        """Number of places that the prefix takes in a slot."""
        return self.kv_N2FGD.shape[2]


@dataclass(frozen=True, slots=True)
class KvShape:
    """Sizes, dtype and device of the keys and values in a cache."""

    layers: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def place_bytes(self) -> int:
        """Bytes of one place: keys and values of all layers."""
        # 28 KiB for ChatGLM2-6B in half precision.
        return 2 * self.layers * self.groups * self.head_dim * self.dtype.itemsize


class SlotCache:
    """Keys and values [S, G, L, D] of each layer. Empty until the first `resize`.

    A slot has at most `max_places` places; `max_bytes` limits all keys and values. `version`
    changes whenever the tensors are replaced, which invalidates recorded CUDA graphs.
    """

    def __init__(self, shape: KvShape, max_places: int, max_bytes: int) -> None:
        self._shape = shape
        self._max_length = round_up(max_places)
        self._max_bytes = max_bytes
        self.version = 0
        self.drop()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self._shape.dtype

    def drop(self) -> None:
        """Free all memory; the cache then has no slots."""
        self.version += 1
        self.slots = 0
        self.length = 0
        self.keys_SGLD: list[torch.Tensor] = []
        self.values_SGLD: list[torch.Tensor] = []

    def next_length(self, places: int) -> int:
        """The length to grow slots to for `places` places.

        At least twice the present length, so that copies are rare, unless that would cost slots.
        """
        doubled = min(self._max_length, round_up(max(places, 2 * self.length)))
        # Losing a slot means preempting a sequence, which costs more than another copy.
        return doubled if self.slots_within(doubled) >= self.slots else round_up(places)

    def slots_within(self, length: int) -> int:
        """Number of slots of `length` places that fit in `max_bytes`; at least one."""
        return max(1, self._max_bytes // (length * self._shape.place_bytes))

    def resize(self, slots: int, length: int) -> None:
        """Resize to `slots` slots of `length` places, keeping the contents that fit.

        Works layer by layer, so that memory peaks at the copy of one layer.
        """
        self.version += 1
        kept_slots = min(slots, self.slots)
        kept_places = min(length, self.length)
        for tensors in (self.keys_SGLD, self.values_SGLD):
            for layer in range(self._shape.layers):
                resized = self._zeros(slots, length)
                if layer < len(tensors):
                    old = tensors[layer][:kept_slots, :, :kept_places]
                    resized[:kept_slots, :, :kept_places] = old
                    tensors[layer] = resized
                else:
                    tensors.append(resized)
        self.slots = slots
        self.length = length

    def _zeros(self, slots: int, length: int) -> torch.Tensor:
        # Zeros, because masked places have weight 0, and 0 times garbage may be nan.
        return torch.zeros(
            (slots, self._shape.groups, length, self._shape.head_dim),
            dtype=self._shape.dtype,
            device=self._shape.device,
        )

    def write(
        self,
        layer: int,
        slots_T: torch.Tensor,
        places_T: torch.Tensor,
        key_TGD: torch.Tensor,
        value_TGD: torch.Tensor,
    ) -> None:
        """Store the key and value of each token t at place `places_T[t]` of slot `slots_T[t]`."""
        # Two index tensors with a slice between them put the tokens first: [T, G, D].
        self.keys_SGLD[layer][slots_T, :, places_T] = key_TGD
        self.values_SGLD[layer][slots_T, :, places_T] = value_TGD

    def write_prefix(self, slots: Sequence[int], prefix: KvPrefix) -> None:
        """Store `prefix` in the first places of each of `slots`."""
        index = torch.tensor(slots, device=self._shape.device)
        for layer, (key_FGD, value_FGD) in enumerate(prefix.kv_N2FGD):
            self.keys_SGLD[layer][index, :, : prefix.places] = key_FGD.transpose(0, 1)
            self.values_SGLD[layer][index, :, : prefix.places] = value_FGD.transpose(0, 1)

    def move(self, sources: Sequence[int], targets: Sequence[int], places: int) -> None:
        """Copy the first `places` places of each slot in `sources` to the slot in `targets`."""
        source = torch.tensor(sources, device=self._shape.device)
        target = torch.tensor(targets, device=self._shape.device)
        for tensor in (*self.keys_SGLD, *self.values_SGLD):
            # Indexing copies all sources before the first write, so both may overlap.
            tensor[target, :, :places] = tensor[source, :, :places]

    def wipe(self, slots: Sequence[int]) -> None:
        """Zero `slots`, because a nan in them would reach the next sequence through masked places.

        0, the weight of a masked place, times nan is nan.
        """
        for tensor in (*self.keys_SGLD, *self.values_SGLD):
            tensor[slots] = 0
