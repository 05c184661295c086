"""Decides which sequences run in the next forward: policy alone, no tensors and no threads.

Every forward takes one token of each sequence that is being generated, and as many tokens of
waiting prompts as the budget allows. A sequence has consecutive places in the arena, more of them
as it grows; when none are left, the sequence admitted last is preempted. It keeps its ids, which
are prefilled with its prompt when it is admitted again, so no token is drawn twice.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.engine.queue import (
    Limits,
    PendingRequest,
    TokenSequence,
    in_families,
    shared_prefix,
)
from glmbatch.glm.engine.sampler import Sampler
from glmbatch.glm.model.places import Places

# Within a window of this many consecutive requests, the longest answers go first, so that no long
# one is left to run alone at the end. The window bounds how long a short request can wait.
WINDOW = 4096
# A sequence takes places for this many tokens of its answer at first, and then as many at a time:
# few answers are as long as `max_tokens` allows.
ANSWER_PLACES = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` consecutive tokens of a sequence, from token `first` on.

    With `samples`, the next token is chosen after them. `source` is the row of the forward before
    whose token this is, as it is not read yet; -1 if all ids are known.
    """

    sequence: TokenSequence
    first: int
    count: int
    samples: bool
    source: int = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward: the pieces, those of one token first.

    Before it, the places in `moves` (source, target, places) are copied, in this order, and the
    prefixes of the `admitted` sequences are written.
    """

    pieces: Sequence[Piece]
    moves: Sequence[tuple[int, int, int]]
    admitted: Sequence[TokenSequence]


class Scheduler:
    """The waiting queue and the running sequences.

    `trained_places` are the places before each sequence that have no positions. `places` are those
    of the arena, and are replaced with it while nothing runs.
    """

    def __init__(self, max_positions: int, trained_places: int, eos_id: int) -> None:
        self._eos_id = eos_id
        self._max_positions = max_positions
        self._trained_places = trained_places
        self._waiting: list[tuple[tuple[int, ...], TokenSequence]] = []
        self._moves: list[tuple[int, int, int]] = []
        self.running: list[TokenSequence] = []  # in order of admission
        self.places = Places(0)

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting) or bool(self.running)

    def push(self, pending: PendingRequest[GenerateRequest]) -> None:
        """Add a request to the waiting queue, with those beside it."""
        for member, (own, family) in enumerate(in_families(pending)):
            request = own.request
            writing = None if request.form is None else request.form.begin()
            sampler = Sampler.of(request, self._eos_id, writing)
            seq = TokenSequence(own, shared_prefix(request), sampler, writing)
            if writing is not None:
                seq.replace_end(0, writing.begin())
            seq.family, seq.member = family, member
            if family is not None:
                family.members.append(seq)
            self._wait(seq)

    def schedule(self, limits: Limits) -> Batch:
        """The next forward; without pieces, nothing can run before the last one is read."""
        for seq in list(self.running):
            if seq.pending.call.cancelled:
                self.finish(seq)
        self._moves = []
        running = len(self.running)
        pieces = self._next_pieces(limits.batch_tokens)
        admitted: list[TokenSequence] = []
        # Otherwise it would be the preempted ones that are admitted.
        if len(self.running) == running or not self.running:
            budget = limits.batch_tokens - sum(piece.count for piece in pieces if piece.count > 1)
            admitted = self._admit(limits, budget)
        for seq in admitted:
            if not self._waits_for_family(seq):
                pieces.append(self._piece(seq, limits.batch_tokens))
        pieces.sort(key=lambda piece: piece.count > 1)
        for row, piece in enumerate(pieces):
            seq = piece.sequence
            seq.row = row
            seq.cached += piece.count
            seq.in_flight += piece.samples
        return Batch(pieces, self._moves, admitted)

    def undo(self, batch: Batch) -> None:
        """Forget that `batch` was launched, because it failed. All its sequences are preempted."""
        for piece in batch.pieces:
            seq = piece.sequence
            seq.in_flight -= piece.samples
            seq.void = seq.void and seq.in_flight > 0
        self.preempt_all()

    def preempt_all(self) -> None:
        """Return every running sequence to the waiting queue."""
        for seq in list(self.running):
            self._preempt(seq)

    @property
    def next_waiting(self) -> TokenSequence:
        """The first of the waiting queue."""
        return self._waiting[0][1]

    def finish(self, seq: TokenSequence) -> None:
        """Remove a sequence, running or waiting."""
        seq.done = True
        if seq.room:
            self._release(seq)

    def _next_pieces(self, chunk_tokens: int) -> list[Piece]:
        """The next piece of each running sequence that has one."""
        pieces = []
        prefill_tokens = 0
        for seq in list(self.running):
            # The token in flight may be the last of its answer.
            ends = seq.in_flight and seq.length + seq.in_flight >= self._longest(seq)
            if ends or not seq.room or self._waits_for_family(seq):
                continue
            piece = self._piece(seq, chunk_tokens)
            if piece.count > 1:
                # A long prompt is prefilled in full chunks, whatever else is in the batch, so
                # that the pieces of a row do not depend on other rows.
                if prefill_tokens and prefill_tokens + piece.count > chunk_tokens:
                    continue
                prefill_tokens += piece.count
            if self._make_room(seq, piece):
                pieces.append(piece)
        return pieces

    def _piece(self, seq: TokenSequence, chunk_tokens: int) -> Piece:
        known = seq.length - seq.cached
        if known <= 0:
            return Piece(seq, seq.cached, 1, samples=True, source=seq.row)
        # What a family begins with is a piece of its own, so that a row has the same pieces
        # whichever of them reads it.
        ends = seq.shared if seq.cached < seq.shared else seq.length
        count = min(ends - seq.cached, chunk_tokens)
        return Piece(seq, seq.cached, count, samples=count == known)

    def _reader(self, seq: TokenSequence) -> TokenSequence | None:
        """The running sequence of its family that has read most; None if none runs."""
        running = [] if seq.family is None else [s for s in seq.family.members if s.room]
        return max(running, key=lambda member: (member.cached, -member.member), default=None)

    def _waits_for_family(self, seq: TokenSequence) -> bool:
        """Whether another of its family still reads what they begin with; copies it afterwards."""
        if seq.cached >= seq.shared:
            return False
        reader = self._reader(seq)
        if reader is None or reader is seq:
            return False
        if reader.cached < seq.shared:
            return True
        first = self._trained_places + seq.cached
        self._moves.append((reader.start + first, seq.start + first, seq.shared - seq.cached))
        seq.cached = seq.shared
        return False

    def _tokens_to_admit(self, seq: TokenSequence, most: int) -> int:
        """Tokens of the sequence in the forward that admits it, at most `most`."""
        reader = self._reader(seq)
        if reader is None:
            return min((seq.shared or seq.length) - len(seq.prefix), most)
        return min(seq.length - seq.shared, most) if reader.cached >= seq.shared else 0

    def _make_room(self, seq: TokenSequence, piece: Piece) -> bool:
        """Give the sequence places for `piece`, preempting later ones; False if it must wait."""
        needed = self._trained_places + piece.first + piece.count
        while needed > seq.room:
            room = min(needed + ANSWER_PLACES - 1, self._trained_places + self._longest(seq))
            if not (self._grow(seq, room) or self._grow(seq, needed)):
                self._preempt(self.running[-1])
                if not seq.room:
                    return False
        return True

    def _grow(self, seq: TokenSequence, room: int) -> bool:
        """Give the sequence `room` places, where it is or elsewhere; False if no gap is so long."""
        if not self.places.extend(seq.start + seq.room, room - seq.room):
            start = self.places.take(room)
            if start is None:
                return False
            self._moves.append((seq.start, start, self._trained_places + seq.cached))
            self.places.give_back(seq.start, seq.room)
            seq.start = start
        seq.room = room
        return True

    def _longest(self, seq: TokenSequence) -> int:
        """Tokens of the sequence with the longest answer allowed."""
        return min(len(seq.request.prompt_ids) + seq.request.max_tokens, self._max_positions)

    def _admit(self, limits: Limits, budget: int) -> list[TokenSequence]:
        """Take sequences from the waiting queue while rows, budget and places allow."""
        admitted: list[TokenSequence] = []
        full_budget = budget == limits.batch_tokens
        while self._waiting and len(self.running) < limits.slots:
            seq = self._waiting[0][1]
            if seq.done or seq.pending.call.cancelled:
                heapq.heappop(self._waiting)
                continue
            tokens = self._tokens_to_admit(seq, limits.batch_tokens)
            if seq.in_flight or (tokens > budget and (admitted or not full_budget)):
                break
            needed = self._trained_places + seq.length
            room = self._trained_places + min(seq.length + ANSWER_PLACES, self._longest(seq))
            if not self.running:
                room = max(needed, min(room, self.places.total))
            start = self.places.take(room)
            if start is None:
                break
            heapq.heappop(self._waiting)
            seq.start, seq.room, seq.cached = start, room, len(seq.prefix)
            budget -= tokens
            self.running.append(seq)
            admitted.append(seq)
        return admitted

    def _preempt(self, seq: TokenSequence) -> None:
        self._release(seq)
        self._wait(seq)

    def _release(self, seq: TokenSequence) -> None:
        self.places.give_back(seq.start, seq.room)
        seq.room = seq.cached = 0
        self.running.remove(seq)

    def _wait(self, seq: TokenSequence) -> None:
        request, arrival = seq.request, seq.pending.arrival
        answer, prompt = request.max_tokens, len(request.prompt_ids)
        if seq.family is not None:
            answer, prompt = seq.family.longest
        rank = (arrival // WINDOW, -answer, -prompt, arrival, seq.member)
        heapq.heappush(self._waiting, (rank, seq))
