"""Runs the scheduler's batches on the device: builds tensors, launches a forward, reads tokens.

The next forward can be launched before the tokens of the last one are read: they stay on the
device, and the host reads them while the next one runs.

Shapes: T tokens, R rows, S rows of one token, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from glmbatch.glm.engine.queue import Limits
from glmbatch.glm.engine.scheduler import Batch, Piece
from glmbatch.glm.model.arena import Arena
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.rows import Rows, to_device
from glmbatch.glm.model.sampling import next_tokens
from glmbatch.glm.oom import catch_oom, empty_cache

logger = logging.getLogger(__name__)

# Recorded steps are for rows of at most this many places, or of any number: the bound decides
# how many parts the places of a row are attended to in.
SHORT_PLACES = 4096


class Readback:
    """Tensors on their way from the device to the host."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._event: Any = None
        if tensors[0].device.type == "cuda":
            tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
            # Not `tolist` at once: it would wait for everything that was launched meanwhile.
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._tensors = tensors

    def wait(self) -> list[Any]:
        """The tensors as lists, after the device has computed them."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]


class Step:
    """A launched forward: the batch, and the next token of each of its rows."""

    def __init__(
        self, batch: Batch, tokens_R: torch.Tensor, log_probs_R: torch.Tensor | None
    ) -> None:
        self.batch = batch
        self.tokens_R = tokens_R
        self._readback = Readback(*(x for x in (tokens_R, log_probs_R) if x is not None))

    def tokens(self) -> tuple[list[int], list[float] | None]:
        """The token of each row and, if asked for, its log-probability. Waits for the device."""
        tokens, *log_probs = self._readback.wait()
        return tokens, log_probs[0] if log_probs else None


class ModelRunner:
    """The network with an arena of keys and values within `limits.cache_bytes`."""

    def __init__(self, network: Network, limits: Limits) -> None:
        self._network = network
        self._limits = limits
        self._arena: Arena | None = None
        self._graphs: Any = None

    @property
    def has_arena(self) -> bool:
        """Whether the arena is allocated."""
        return self._arena is not None

    @property
    def arena_bytes(self) -> int:
        """Memory of the arena; 0 while there is none."""
        arena = self._arena  # the worker may free it meanwhile
        return 0 if arena is None else arena.places * self._network.kv_shape.place_bytes

    def allocate(self) -> int:
        """Allocate an arena for the longest rows, within the limits; returns its places, or 0."""
        most = self._limits.slots * self._network.row_places
        places = max(1, min(most, self._limits.cache_bytes // self._network.kv_shape.place_bytes))
        while places:
            # The last place is for rows that fill up a recorded step.
            self._arena = catch_oom(partial(Arena, self._network.kv_shape, places + 1))
            if self._arena is not None:
                self._graphs = self._network.step_graphs(self._arena, spare_place=places)
                break
            places //= 2
        return places

    def release(self) -> None:
        """Free the arena."""
        self._arena = self._graphs = None
        empty_cache()

    def halve(self) -> bool:
        """Free the arena; the next one has half as many places. False if it cannot be smaller.

        It always has the places of the longest row, so no row fails that would have fitted.
        """
        assert self._arena is not None
        places = self._arena.places - 1
        half = max(places // 2, min(places, self._network.row_places))
        if half < places:
            logger.warning("out of memory: rows being generated now share %d places", half)
        self._limits.cache_bytes = half * self._network.kv_shape.place_bytes
        self.release()
        return half < places

    def launch(self, batch: Batch, previous: Step | None, chunk_tokens: int) -> torch.Tensor:
        """Launch the forward of `batch`; returns the logits [R, V] that follow each row.

        `previous` has the tokens that are not read yet.
        """
        assert self._arena is not None
        for source, target, places in batch.moves:
            self._arena.copy(source, target, places)
        for seq in batch.admitted:
            prefix = self._network.cached_prefix(seq.prefix, chunk_tokens)
            if prefix is not None:
                self._arena.write_prefix(seq.start, prefix)
        return self._network.token_logits(self._forward(batch, previous, self._arena))

    def choose(self, batch: Batch, logits_RV: torch.Tensor) -> Step:
        """Choose the next token of each row. All earlier tokens must have been read."""
        rows = []
        for row, piece in enumerate(batch.pieces):
            sampler = piece.sequence.sampler
            if piece.samples and sampler is not None and not piece.sequence.void:
                rows.append(sampler.at(row, piece.sequence.ids))
        log_probs = any(piece.sequence.request.log_probs for piece in batch.pieces)
        chosen = next_tokens(logits_RV, rows, log_probs)
        return Step(batch, chosen.tokens_R, chosen.log_probs_R)

    def _forward(self, batch: Batch, previous: Step | None, arena: Arena) -> torch.Tensor:
        trained = self._network.trained_places
        pieces = batch.pieces
        rows = Rows(
            starts=[piece.sequence.start for piece in pieces],
            used=[trained + piece.first + piece.count for piece in pieces],
            counts=[piece.count for piece in pieces],
            single=sum(piece.count == 1 for piece in pieces),
        )
        ids = np.fromiter(chain.from_iterable(map(_known_ids, pieces)), np.int64)
        sources = np.array([piece.source for piece in pieces[: rows.single]], np.int64)
        ids_T, sources_S = to_device(self._network.device, ids, sources)
        if previous is not None:
            # An id that is not read yet may be that of a row whose scores are not finite, -1.
            unread_S = previous.tokens_R[sources_S.clamp(min=0)].clamp(min=0)
            known_S = ids_T[: rows.single]
            ids_T[: rows.single] = torch.where(sources_S < 0, known_S, unread_S)
        if self._graphs is None or rows.single < len(pieces):
            return self._network.forward(ids_T, rows, arena)
        numbers_3R = np.array([[used - 1 - trained for used in rows.used], rows.starts, rows.used])
        (inputs_3R,) = to_device(self._network.device, numbers_3R)
        short = max(rows.used) <= SHORT_PLACES
        hidden_RC: torch.Tensor = self._graphs(
            torch.cat((ids_T[None], inputs_3R)), SHORT_PLACES if short else arena.places
        )
        return hidden_RC


def _known_ids(piece: Piece) -> list[int]:
    if piece.source >= 0:
        return [0]  # replaced on the device
    seq, first, end = piece.sequence, piece.first, piece.first + piece.count
    prompt = seq.request.prompt_ids
    if first >= len(prompt):
        return seq.ids[first - len(prompt) : end - len(prompt)]
    return [*prompt[first:end], *seq.ids[: max(0, end - len(prompt))]]
