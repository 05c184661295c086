"""Continuous batching: prompts enter free slots, every live slot gets one token a step, a finished slot is refilled.

A row that has to leave its slot keeps the ids written so far and enters again behind them, so nothing is lost and no
token is drawn twice.

Shapes: R rows read, T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from glmbatch.glm.engine.oom import within_memory
from glmbatch.glm.engine.protocol import GenerateRequest, GenerateResult
from glmbatch.glm.engine.queue import Job, Limits, WaitingLine, shared_prefix
from glmbatch.glm.model.kv_cache import SlotCache
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.packing import Segment
from glmbatch.glm.model.sampling import NOT_FINITE, Draw, Uniforms, next_tokens

# Rows that arrive within so many requests of one another may overtake: the longest go first, so that the last to
# finish began early; one that keeps being overtaken waits for this many at most.
WINDOW = 4096


@dataclass(slots=True, eq=False)
class _Row:
    """One request and what is written for it so far."""

    job: Job[GenerateRequest]
    prefix: tuple[int, ...]
    uniforms: Uniforms | None
    ids: list[int] = field(default_factory=list)
    given_up: bool = False
    budget: int | None = None  # what a batch could hold before this row alone was too much

    @property
    def length(self) -> int:
        return len(self.job.request.prompt_ids) + len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the row if nothing ends it early."""
        return len(self.job.request.prompt_ids) + self.job.request.max_tokens

    def segment(self) -> Segment:
        return Segment([*self.job.request.prompt_ids[len(self.prefix) :], *self.ids])


class Generation:
    """Generate requests that wait for the model, and those it is writing for, each in a slot of the cache."""

    def __init__(self, network: Network, limits: Limits, eos_id: int, cache_bytes: int) -> None:
        self._network, self._limits = network, limits
        self._eos_id = eos_id
        self._cache = SlotCache(
            network.kv_shape, network.trained_places + network.max_positions, cache_bytes
        )
        self._rows: list[_Row | None] = []  # by slot; None is a hole to fill
        self._alone: _Row | None = (
            None  # found no room in one of many slots; has a cache of one slot to try
        )
        self._line: WaitingLine[_Row] = WaitingLine(
            rank=lambda row: (row.job.arrival // WINDOW, -row.longest, row.job.arrival),
            tokens=lambda row: row.length - len(row.prefix),
            group=lambda row: row.prefix,
            gone=lambda row: row.given_up or row.job.call.cancelled,
        )

    @property
    def busy(self) -> bool:
        return bool(self._line) or bool(self._rows)

    def push(self, job: Job[GenerateRequest]) -> None:
        uniforms = Uniforms(job.request.seed) if job.request.temperature > 0 else None
        self._line.push(_Row(job, shared_prefix(job.request), uniforms))

    def turn(self) -> None:
        """Bring waiting prompts into free slots, or write one token into every slot that is taken."""
        self._rows = [row if row and not row.job.call.cancelled else None for row in self._rows]
        if self._alone is not None and self._alone.job.call.cancelled:
            self._alone = None
        slots = min(self._most_slots, self._cache.slots or self._most_slots)
        free = slots - sum(row is not None for row in self._rows)
        batch = self._line.take(self._limits.batch_tokens, free) if free > 0 else []
        if batch:
            self._enter(batch)
        elif rows := self._close_holes():
            self._write(rows)

    def give_way(self) -> bool:
        """Free the cache for others; its rows wait again, half as many at once. False when there was none to free."""
        if not self._cache.slots:
            return False
        if self._rows:
            self._limits.halve_slots(self._cache.slots)
        self._leave()
        return True

    @property
    def _most_slots(self) -> int:
        return self._limits.slots if self._alone is None else 1

    def _enter(self, batch: Sequence[_Row]) -> None:
        """Give each of `batch` a free slot, read its ids into it and choose its next token."""
        if not any(self._rows) and self._cache.slots != self._most_slots:
            self._cache.drop()  # one long row had cost the others their slots; start over
        if not within_memory(lambda: self._lengthen(max(row.length for row in batch))):
            self._back_off(batch)
            return
        slots = [
            slot
            for slot in range(self._cache.slots)
            if slot >= len(self._rows) or self._rows[slot] is None
        ]
        for row in batch[len(slots) :]:
            self._line.push(row)
        batch = batch[: len(slots)]
        slots = slots[: len(batch)]
        tokens = within_memory(lambda: self._read(batch, slots)) if batch else []
        if tokens is None:
            self._cache.wipe(slots)  # half written, perhaps with what is not finite
            self._back_off(batch, entering=True)
            return
        self._rows += [None] * (max(slots, default=-1) + 1 - len(self._rows))
        for slot, row in zip(slots, batch, strict=True):
            self._rows[slot] = row
        self._advance(slots, tokens)

    def _read(self, batch: Sequence[_Row], slots: Sequence[int]) -> list[int]:
        chunk_tokens = self._limits.batch_tokens
        prefix = self._network.prefix(batch[0].prefix, chunk_tokens)
        segments = [row.segment() for row in batch]
        if len(batch) == 1:  # a row over the budget comes alone, and goes in chunks
            segments[0], prefix = self._network.shorten(segments[0], prefix, chunk_tokens)
        if prefix is not None:
            self._cache.write_prefix(slots, prefix)
        first = 0 if prefix is None else prefix.places
        owners = [slot for slot, segment in zip(slots, segments, strict=True) for _ in segment.ids]
        places = [first + place for segment in segments for place in range(len(segment.ids))]
        owners_T, places_T = torch.tensor([owners, places], device=self._network.device)

        def store(layer: int, key_TGD: torch.Tensor, value_TGD: torch.Tensor) -> None:
            self._cache.write(layer, owners_T, places_T, key_TGD, value_TGD)

        return self._choose(self._network.read(segments, prefix, store), batch)

    def _write(self, rows: Sequence[_Row]) -> None:
        """One more token for each of `rows`, which fill the first slots."""
        if not within_memory(lambda: self._lengthen(max(row.length for row in rows))):
            self._back_off()
            return
        rows = rows[: len(self._rows)]  # a longer cache may have fewer slots
        tokens = within_memory(
            lambda: self._choose(
                self._network.step(
                    [row.ids[-1] for row in rows], [row.length - 1 for row in rows], self._cache
                ),
                rows,
            )
        )
        if tokens is None:
            self._back_off()
            return
        self._advance(range(len(rows)), tokens)

    def _choose(self, hidden_RC: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
        draws = [
            Draw(
                at,
                request.temperature,
                request.top_k,
                request.top_p,
                row.uniforms.number(len(row.ids)),
            )
            for at, row in enumerate(rows)
            if row.uniforms is not None and (request := row.job.request)
        ]
        return next_tokens(self._network.token_logits(hidden_RC), draws)

    def _advance(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Give each slot's row its token; rows that are finished leave a hole."""
        for slot, token in zip(slots, tokens, strict=True):
            row = self._rows[slot]
            assert row is not None
            reason = self._accept(row, token)
            if reason is None:
                continue
            self._rows[slot] = None
            if row is self._alone:
                self._alone = None
            error = None
            if token == NOT_FINITE:
                self._cache.wipe([slot])
                error = f"the model's scores are not finite after {len(row.ids)} tokens"
            index = row.job.request.index
            row.job.call.deliver(
                GenerateResult(index, () if error else tuple(row.ids), reason, error)
            )

    def _accept(self, row: _Row, token: int) -> str | None:
        """Add `token` to `row`; why the row is finished, if it is."""
        if token == NOT_FINITE:
            return "error"
        if token == self._eos_id:
            return "stop"
        row.ids.append(token)
        request = row.job.request
        if request.should_stop is not None and self._asks_to_stop(row):
            return "stop"
        if len(row.ids) >= request.max_tokens or row.length >= self._network.max_positions:
            return "length"
        return None

    def _asks_to_stop(self, row: _Row) -> bool:
        assert row.job.request.should_stop is not None
        try:
            return row.job.request.should_stop(row.ids)
        except Exception as error:  # noqa: BLE001 - the caller's own code: raised to the caller, not to its batch-mates
            row.job.call.fail(error)
            return False

    def _close_holes(self) -> list[_Row]:
        """Move the last rows into holes, so that live slots are the first ones; the rows, by slot."""
        live = sum(row is not None for row in self._rows)
        sources = [slot for slot in range(live, len(self._rows)) if self._rows[slot] is not None]
        targets = [slot for slot in range(live) if self._rows[slot] is None]
        if sources:
            places = max(row.length for row in self._rows[live:] if row is not None)
            self._cache.move(sources, targets, self._network.trained_places + places)
        for source, target in zip(sources, targets, strict=True):
            self._rows[target] = self._rows[source]
        del self._rows[live:]
        return [row for row in self._rows if row is not None]

    def _lengthen(self, length: int) -> bool:
        """Make every slot hold `length` tokens; rows for which that leaves no slot wait again. Always true."""
        places = self._network.trained_places + length
        if places > self._cache.length:
            self._close_holes()
            longer = self._cache.next_length(places)
            slots = min(self._most_slots, self._cache.slots_within(longer))
            for row in self._rows[slots:]:
                assert row is not None
                self._line.push(row)
            del self._rows[slots:]
            self._cache.resize(slots, longer)
        return True

    def _back_off(self, batch: Sequence[_Row] = (), entering: bool = False) -> None:
        """After a full device: fewer tokens in a forward where that helps, else half the slots, else one row alone."""
        self._network.give_back()
        for row in batch:
            self._line.push(row)
        tokens = sum(row.length - len(row.prefix) for row in batch)
        if entering and len(batch) > 1:
            self._limits.halve_batch(tokens)
            return
        if entering:
            batch[0].budget = batch[0].budget or self._limits.batch_tokens
            if self._limits.chunk_smaller(tokens):
                return
        rows = [*batch, *(row for row in self._rows if row is not None)]
        if len(rows) > 1:
            self._limits.halve_slots(self._cache.slots or self._limits.slots)
        elif self._alone is not rows[0]:
            self._alone = rows[0]
        else:
            device, length = self._network.device, rows[0].length
            fault = f"no room on {device} to generate for one row of {length} tokens"
            rows[0].job.call.deliver(GenerateResult(rows[0].job.request.index, (), "error", fault))
            rows[0].given_up, self._alone = True, None
            self._limits.batch_tokens = rows[0].budget or self._limits.batch_tokens
        self._leave()

    def _leave(self) -> None:
        """Every row leaves its slot and waits again; the cache's memory is given back."""
        for row in self._rows:
            if row is not None:
                self._line.push(row)
        self._rows = []
        self._cache.drop()
