"""Continuous batching over the slots of the KV cache.

Waiting sequences are admitted into free slots by prefill, each decode step adds one token to every
live slot, and a finished slot is filled again. A preempted sequence keeps its generated ids, which
are prefilled with the prompt when it is admitted again; no token is drawn twice.

Shapes: R rows, T tokens, G key/value groups, D head size, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from glmbatch.glm.engine.oom import catch_oom
from glmbatch.glm.engine.protocol import GenerateRequest, GenerateResult, not_finite
from glmbatch.glm.engine.queue import Limits, PendingRequest, WaitingQueue, shared_prefix
from glmbatch.glm.engine.sampler import Sampler
from glmbatch.glm.model.kv_cache import SlotCache
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.packing import PackedPrompt
from glmbatch.glm.model.sampling import NOT_FINITE, RowSampling, next_tokens

# Within a window of this many consecutive requests, the longest go first, so that no long one is
# left to run alone at the end. The window bounds how long a short request can wait.
WINDOW = 4096


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request and the ids generated for it so far."""

    pending: PendingRequest[GenerateRequest]
    prefix: tuple[int, ...]
    sampler: Sampler | None
    ids: list[int] = field(default_factory=list)
    failed: bool = False
    budget: int | None = None  # the token budget before it was lowered for this sequence alone

    @property
    def request(self) -> GenerateRequest:
        return self.pending.request

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.request.prompt_ids) + len(self.ids)

    @property
    def max_length(self) -> int:
        """Tokens of the prompt and of the longest answer allowed."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    @property
    def prefill_tokens(self) -> int:
        """Tokens to prefill after the shared prefix."""
        return self.length - len(self.prefix)

    def prompt(self) -> PackedPrompt:
        """The ids to prefill: the prompt after the shared prefix, then the ids generated so far."""
        return PackedPrompt([*self.request.prompt_ids[len(self.prefix) :], *self.ids])

    def sampling(self, row: int) -> RowSampling | None:
        """How to choose its next token at `row` of a batch; None for plain greedy decoding."""
        return None if self.sampler is None else self.sampler.at(row, self.ids)


class Generation:
    """The waiting queue of generate requests, and the sequences in the slots of the cache.

    `cache_bytes` limits the memory of the KV cache.
    """

    def __init__(self, network: Network, limits: Limits, eos_id: int, cache_bytes: int) -> None:
        self._network = network
        self._limits = limits
        self._eos_id = eos_id
        max_places = network.trained_places + network.max_positions
        self._cache = SlotCache(network.kv_shape, max_places, cache_bytes)
        self._sequences: list[_Sequence | None] = []  # by slot; None is a free slot among live ones
        # A sequence that ran out of memory among others and is tried in a cache of one slot.
        self._alone: _Sequence | None = None
        self._waiting: WaitingQueue[_Sequence] = WaitingQueue(
            rank=lambda seq: (seq.pending.arrival // WINDOW, -seq.max_length, seq.pending.arrival),
            tokens=lambda seq: seq.prefill_tokens,
            group=lambda seq: seq.prefix,
            cancelled=lambda seq: seq.failed or seq.pending.call.cancelled,
        )

    @property
    def busy(self) -> bool:
        """Whether any request waits or is in a slot."""
        return bool(self._waiting) or bool(self._sequences)

    def push(self, pending: PendingRequest[GenerateRequest]) -> None:
        """Add a request to the waiting queue."""
        request = pending.request
        self._waiting.push(
            _Sequence(pending, shared_prefix(request), Sampler.of(request, self._eos_id))
        )

    def run_batch(self) -> None:
        """Admit waiting requests into free slots, or run one decode step over the live slots."""
        self._drop_cancelled()
        slots = min(self._max_slots, self._cache.slots or self._max_slots)
        free = slots - len(self._live())
        batch = self._waiting.take(self._limits.batch_tokens, free) if free > 0 else []
        if batch:
            self._admit(batch)
        elif sequences := self._compact_slots():
            self._decode_step(sequences)

    def preempt(self) -> bool:
        """Free the cache for classify requests and halve the slots.

        Returns False if the cache was empty. All sequences return to the waiting queue.
        """
        if not self._cache.slots:
            return False
        if self._sequences:
            self._limits.halve_slots(self._cache.slots)
        self._preempt_all()
        return True

    @property
    def _max_slots(self) -> int:
        return self._limits.slots if self._alone is None else 1

    def _live(self) -> list[_Sequence]:
        """The sequences that are in a slot, by slot."""
        return [seq for seq in self._sequences if seq is not None]

    def _drop_cancelled(self) -> None:
        for slot, seq in enumerate(self._sequences):
            if seq is not None and seq.pending.call.cancelled:
                self._sequences[slot] = None
        if self._alone is not None and self._alone.pending.call.cancelled:
            self._alone = None

    def _admit(self, batch: Sequence[_Sequence]) -> None:
        """Prefill each of `batch` into a free slot and choose its next token."""
        if not any(self._sequences) and self._cache.slots != self._max_slots:
            self._cache.drop()  # a long sequence had reduced the slots: start over with all of them
        if not catch_oom(lambda: self._grow_cache(max(seq.length for seq in batch))):
            self._handle_out_of_memory(batch)
            return
        slots = self._free_slots()[: len(batch)]
        for seq in batch[len(slots) :]:  # a longer cache may have fewer slots
            self._waiting.push(seq)
        admitted = batch[: len(slots)]
        tokens = catch_oom(lambda: self._prefill(admitted, slots)) if admitted else []
        if tokens is None:
            self._cache.wipe(slots)  # partly written, perhaps with values that are not finite
            self._handle_out_of_memory(admitted, in_prefill=True)
            return
        self._sequences += [None] * (max(slots, default=-1) + 1 - len(self._sequences))
        for slot, seq in zip(slots, admitted, strict=True):
            self._sequences[slot] = seq
        # Prefill yields the first token without a decode step.
        self._append_tokens(slots, tokens)

    def _free_slots(self) -> list[int]:
        beyond = range(len(self._sequences), self._cache.slots)
        return [slot for slot, seq in enumerate(self._sequences) if seq is None] + list(beyond)

    def _prefill(self, batch: Sequence[_Sequence], slots: Sequence[int]) -> list[int]:
        """Prefill `batch` into `slots` of the cache; returns the next token of each sequence."""
        chunk_tokens = self._limits.batch_tokens
        prefix = self._network.cached_prefix(batch[0].prefix, chunk_tokens)
        prompts = [seq.prompt() for seq in batch]
        if len(batch) == 1:  # a prompt over the token budget is alone, and is prefilled in chunks
            prompts[0], prefix = self._network.prefill_ahead(prompts[0], prefix, chunk_tokens)
        first = 0
        if prefix is not None:
            self._cache.write_prefix(slots, prefix)
            first = prefix.places
        slot_of_token: list[int] = []
        place_of_token: list[int] = []
        for slot, prompt in zip(slots, prompts, strict=True):
            slot_of_token += [slot] * len(prompt.ids)
            place_of_token += range(first, first + len(prompt.ids))
        indexes_2T = torch.tensor([slot_of_token, place_of_token], device=self._network.device)
        slots_T, places_T = indexes_2T

        def store(layer: int, key_TGD: torch.Tensor, value_TGD: torch.Tensor) -> None:
            self._cache.write(layer, slots_T, places_T, key_TGD, value_TGD)

        return self._choose(self._network.prefill(prompts, prefix, store), batch)

    def _decode_step(self, sequences: Sequence[_Sequence]) -> None:
        """Generate one more token for each of `sequences`, which are in the first slots."""
        if not catch_oom(lambda: self._grow_cache(max(seq.length for seq in sequences))):
            self._handle_out_of_memory()
            return
        live = sequences[: len(self._sequences)]  # a longer cache may have fewer slots
        tokens = catch_oom(lambda: self._decode(live))
        if tokens is None:
            self._handle_out_of_memory()
            return
        self._append_tokens(range(len(live)), tokens)

    def _decode(self, live: Sequence[_Sequence]) -> list[int]:
        last_ids = [seq.ids[-1] for seq in live]
        positions = [seq.length - 1 for seq in live]
        return self._choose(self._network.decode(last_ids, positions, self._cache), live)

    def _choose(self, hidden_RC: torch.Tensor, batch: Sequence[_Sequence]) -> list[int]:
        """The next token of each sequence from its final state."""
        rows = [how for row, seq in enumerate(batch) if (how := seq.sampling(row)) is not None]
        tokens: list[int] = next_tokens(
            self._network.token_logits(hidden_RC), rows
        ).tokens_R.tolist()
        return tokens

    def _append_tokens(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Append each token to the sequence in its slot; deliver and remove finished sequences."""
        for slot, token in zip(slots, tokens, strict=True):
            seq = self._sequences[slot]
            assert seq is not None
            reason = self._append(seq, token)
            if reason is None:
                continue
            self._sequences[slot] = None
            if seq is self._alone:
                self._alone = None
            index = seq.request.index
            if token == NOT_FINITE:
                self._cache.wipe([slot])
                fault = not_finite(self._network.dtype_name, len(seq.ids))
                seq.pending.call.deliver(GenerateResult(index, (), reason, fault))
            else:
                seq.pending.call.deliver(GenerateResult(index, tuple(seq.ids), reason))

    def _append(self, seq: _Sequence, token: int) -> str | None:
        """Add `token` to `seq`; returns why the sequence is finished, or None."""
        if token == NOT_FINITE:
            return "error"
        if token == self._eos_id:
            return "stop"
        seq.ids.append(token)
        if self._asks_to_stop(seq):
            return "stop"
        max_tokens, max_positions = seq.request.max_tokens, self._network.max_positions
        if len(seq.ids) >= max_tokens or seq.length >= max_positions:
            return "length"
        return None

    def _asks_to_stop(self, seq: _Sequence) -> bool:
        should_stop = seq.request.should_stop
        if should_stop is None:
            return False
        try:
            return should_stop(seq.ids)
        except Exception as error:  # noqa: BLE001 - the caller's code: raised in that caller only
            seq.pending.call.fail(error)
            return False

    def _compact_slots(self) -> list[_Sequence]:
        """Move sequences so that the live slots come first; returns all sequences by slot."""
        live = len(self._live())
        beyond = self._sequences[live:]
        sources = [live + at for at, seq in enumerate(beyond) if seq is not None]
        targets = [slot for slot in range(live) if self._sequences[slot] is None]
        if sources:
            length = max(seq.length for seq in beyond if seq is not None)
            self._cache.move(sources, targets, self._network.trained_places + length)
        for source, target in zip(sources, targets, strict=True):
            self._sequences[target] = self._sequences[source]
        del self._sequences[live:]
        return self._live()

    def _grow_cache(self, length: int) -> bool:
        """Grow the cache to `length` tokens per slot, preempting sequences that no longer fit.

        Returns True, to distinguish success from the None of `catch_oom`.
        """
        places = self._network.trained_places + length
        if places > self._cache.length:
            self._compact_slots()
            longer = self._cache.next_length(places)
            slots = min(self._max_slots, self._cache.slots_within(longer))
            for seq in self._live()[slots:]:
                self._waiting.push(seq)
            del self._sequences[slots:]
            self._cache.resize(slots, longer)
        return True

    def _handle_out_of_memory(
        self, batch: Sequence[_Sequence] = (), in_prefill: bool = False
    ) -> None:
        """Next, try a smaller prefill, then half the slots, then one sequence alone.

        A sequence that runs out of memory even alone fails.
        """
        self._network.release_memory()
        for seq in batch:
            self._waiting.push(seq)
        tokens = sum(seq.prefill_tokens for seq in batch)
        if in_prefill and len(batch) > 1:
            self._limits.halve_batch(tokens)
            return
        if in_prefill:
            batch[0].budget = batch[0].budget or self._limits.batch_tokens
            if self._limits.halve_chunk(tokens):
                return
        active = [*batch, *self._live()]
        if len(active) > 1:
            self._limits.halve_slots(self._cache.slots or self._limits.slots)
        elif self._alone is not active[0]:
            self._alone = active[0]
        else:
            self._fail_without_room(active[0])
        self._preempt_all()

    def _fail_without_room(self, seq: _Sequence) -> None:
        device = self._network.device
        fault = f"not enough memory on {device} to generate for one row of {seq.length} tokens"
        seq.pending.call.deliver(GenerateResult(seq.request.index, (), "error", fault))
        seq.failed = True  # the waiting queue drops it
        self._alone = None
        # Only this sequence is too long: later ones get the original token budget back.
        self._limits.batch_tokens = seq.budget or self._limits.batch_tokens

    def _preempt_all(self) -> None:
        """Return every sequence to the waiting queue and free the memory of the cache."""
        for seq in self._live():
            self._waiting.push(seq)
        self._sequences = []
        self._cache.drop()
