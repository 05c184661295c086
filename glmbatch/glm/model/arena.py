"""Keys and values of many sequences in one arena of places, and of shared prefixes.

A sequence takes consecutive places anywhere in the arena, and attends to its own places alone, so
whatever lies in the others is never read. A place differs from a position: a trained prefix takes
places but no positions. Knows no requests and no model.

Shapes: N layers, G key/value groups, P places, D head size, T tokens, R rows, F places of a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class KvPrefix:
    """Keys and values that precede a row's own tokens, which start at `next_position`.

    A trained prefix has no positions: the text after it still starts at 0.
    """

    kv_N2GFD: torch.Tensor
    next_position: int

    @property
    def places(self) -> int:
        """Number of places that the prefix takes before each row."""
        return self.kv_N2GFD.shape[3]


@dataclass(frozen=True, slots=True)
class KvShape:
    """Sizes, dtype and device of the keys and values in an arena."""

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


class Arena:
    """Keys and values of all layers, for `places` places.

    With `one_layer`, all layers share the memory of one: for a forward after which no key is used
    again.
    """

    def __init__(self, shape: KvShape, places: int, *, one_layer: bool = False) -> None:
        layers = 1 if one_layer else shape.layers
        # Never cleared: nothing reads a place before its sequence has written it.
        self.kv_N2GPD = torch.empty(
            (layers, 2, shape.groups, places, shape.head_dim),
            dtype=shape.dtype,
            device=shape.device,
        )
        # Views are made once: taking one costs as much as a small kernel.
        views = [(kv_2GPD[0], kv_2GPD[1]) for kv_2GPD in self.kv_N2GPD]
        self._layers = views * shape.layers if one_layer else views

    @property
    def places(self) -> int:
        """Number of places."""
        return self.kv_N2GPD.shape[3]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [G, P, D] of one layer."""
        return self._layers[layer]

    def copy(self, source: int, target: int, places: int) -> None:
        """Copy `places` places from place `source` on to place `target` on, in all layers."""
        moved = self.kv_N2GPD[:, :, :, source : source + places]
        self.kv_N2GPD[:, :, :, target : target + places] = moved

    def write_prefix(self, start: int, prefix: KvPrefix) -> None:
        """Store `prefix` from place `start` on, in all layers."""
        self.kv_N2GPD[:, :, :, start : start + prefix.places] = prefix.kv_N2GFD


class KeyStore(Protocol):
    """Where the keys and values of a forward are, for its attention."""

    def put(
        self, layer: int, key_TGD: torch.Tensor, value_TGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store those of the batch's tokens; returns all keys and values [G, P, D] of the layer."""


class BatchKeys:
    """A packed batch without a prefix: place t is its token t, and nothing is copied."""

    def put(
        self, layer: int, key_TGD: torch.Tensor, value_TGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's own keys and values [G, T, D]; see `KeyStore`."""
        return key_TGD.transpose(0, 1), value_TGD.transpose(0, 1)


class ArenaKeys:
    """Stores token t at place `places_T[t]` of `arena`.

    With a `prefix`, its keys and values are stored too, in each layer, at `prefix_places_RF`.
    """

    def __init__(
        self,
        arena: Arena,
        places_T: torch.Tensor,
        prefix: KvPrefix | None = None,
        prefix_places_RF: torch.Tensor | None = None,
    ) -> None:
        self.arena = arena
        self.places_T = places_T
        self._prefix = prefix
        self._prefix_places_RF = prefix_places_RF

    def put(
        self, layer: int, key_TGD: torch.Tensor, value_TGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values [G, P, D] of the layer; see `KeyStore`."""
        keys_GPD, values_GPD = self.arena.layer(layer)
        if self._prefix is not None:
            key_GFD, value_GFD = self._prefix.kv_N2GFD[layer]
            keys_GPD[:, self._prefix_places_RF] = key_GFD[:, None]
            values_GPD[:, self._prefix_places_RF] = value_GFD[:, None]
        keys_GPD[:, self.places_T] = key_TGD.transpose(0, 1).to(keys_GPD.dtype)
        values_GPD[:, self.places_T] = value_TGD.transpose(0, 1).to(values_GPD.dtype)
        return keys_GPD, values_GPD
