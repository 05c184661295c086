"""Continuous batching: one forward after another over the sequences that the scheduler chooses.

Each forward adds a token to every running sequence and prefills prompts of waiting ones beside
them. A finished sequence makes room for the next at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from glmbatch.glm.engine.protocol import (
    FormState,
    GenerateRequest,
    GenerateResult,
    not_finite,
)
from glmbatch.glm.engine.queue import Limits, PendingRequest, TokenSequence
from glmbatch.glm.engine.runner import ModelRunner, Step
from glmbatch.glm.engine.scheduler import Batch, Scheduler
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.places import Places
from glmbatch.glm.model.sampling import NOT_FINITE
from glmbatch.glm.oom import catch_oom

Result = TypeVar("Result")


class Generation:
    """Answers generate requests: a scheduler, and the runner of its batches."""

    def __init__(self, network: Network, limits: Limits, eos_id: int) -> None:
        self._network = network
        self._limits = limits
        self._eos_id = eos_id
        self._scheduler = Scheduler(network.max_positions, network.trained_places, eos_id)
        self._runner = ModelRunner(network, limits)
        # A forward whose tokens are not read yet. On CPU they are there when it returns.
        self._in_flight: Step | None = None
        self._runs_ahead = network.device.type == "cuda"
        self._failures = 0  # times out of memory since a token was read
        self._gave_way = False

    @property
    def slots(self) -> int:
        """At most so many sequences run at once."""
        return self._limits.slots

    @property
    def arena_bytes(self) -> int:
        """Memory of the arena; 0 while there is none."""
        return self._runner.arena_bytes

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self._scheduler.busy or self._in_flight is not None

    def push(self, pending: PendingRequest[GenerateRequest]) -> None:
        """Add a request to the waiting queue."""
        self._scheduler.push(pending)

    def run_batch(self) -> None:
        """Launch the next forward, read the tokens of the one before, then choose the next."""
        if not self._runner.has_arena:
            self._scheduler.places = Places(self._runner.allocate())
        batch = self._scheduler.schedule(self._limits)
        logits_RV = self._launch(batch)
        # The device runs the forward while the host reads the tokens before it.
        self._read_tokens()
        if logits_RV is not None:
            self._in_flight = self._try(batch, lambda: self._runner.choose(batch, logits_RV))
        if not self._runs_ahead:
            self._read_tokens()

    def free_idle(self) -> bool:
        """Free the arena for classify requests, if no request waits or runs; False if it is kept.

        Once: if it is needed again, smaller batches cost less than making it again and again.
        """
        if self._gave_way or self.busy or not self._runner.has_arena:
            return False
        self._gave_way = True
        self._runner.release()
        return True

    def preempt(self) -> bool:
        """Free the memory of keys and values for classify requests, and halve it for later.

        Returns False if there was none. All sequences return to the waiting queue.
        """
        if not self._runner.has_arena:
            return False
        self._read_tokens()
        self._scheduler.preempt_all()
        self._runner.halve()
        return True

    def _launch(self, batch: Batch) -> torch.Tensor | None:
        if not batch.pieces:
            if not self._scheduler.running and self._scheduler.busy and self._in_flight is None:
                # The first sequence does not fit in all the memory that there is.
                self._fail_without_room(self._scheduler.next_waiting)
            return None
        chunk_tokens = self._limits.batch_tokens
        return self._try(batch, lambda: self._runner.launch(batch, self._in_flight, chunk_tokens))

    def _try(self, batch: Batch, work: Callable[[], Result]) -> Result | None:
        """The result of `work` on `batch`; None if memory did not suffice, which is handled."""
        result = catch_oom(work)
        if result is None:
            self._handle_out_of_memory(batch)
        return result

    def _read_tokens(self) -> None:
        """Read the tokens in flight, append each to its sequence, and deliver finished ones."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        tokens, log_probs = step.tokens()
        for row, piece in enumerate(step.batch.pieces):
            seq = piece.sequence
            if not piece.samples or seq.done:
                continue
            seq.in_flight -= 1
            self._failures = 0
            if seq.void:
                seq.void = False
                continue
            if log_probs is not None:
                seq.log_probs.append(log_probs[row])
            reason = self._append(seq, tokens[row])
            if reason is not None:
                self._scheduler.finish(seq)
                seq.pending.call.deliver(self._result(seq, reason))

    def _append(self, seq: TokenSequence, token: int) -> str | None:
        """Add `token` to `seq`; returns why the sequence is finished, or None."""
        if token == NOT_FINITE:
            return "error"
        if seq.writing is not None:
            return self._append_in_form(seq, seq.writing, token)
        if token == self._eos_id:
            return "stop"
        seq.ids.append(token)
        if self._asks_to_stop(seq):
            return "stop"
        if len(seq.ids) >= seq.request.max_tokens or seq.length >= self._network.max_positions:
            return "length"
        return None

    def _append_in_form(self, seq: TokenSequence, writing: FormState, token: int) -> str | None:
        seq.ids.append(token)
        seq.given.append(False)
        try:
            dropped, ids, ended = writing.advance(token)
        except ValueError as error:
            seq.fault = f"the form of the answer cannot go on: {error}"
            return "error"
        seq.replace_end(dropped, ids)
        if not ended:
            return None
        return "length" if writing.was_cut else "stop"

    def _asks_to_stop(self, seq: TokenSequence) -> bool:
        should_stop = seq.request.should_stop
        if should_stop is None:
            return False
        try:
            return should_stop(seq.ids)
        except Exception as error:  # noqa: BLE001 - the caller's code: raised in that caller only
            seq.pending.call.fail(error)
            return False

    def _result(self, seq: TokenSequence, reason: str) -> GenerateResult:
        index = seq.request.index
        if reason == "error":
            fault = seq.fault or not_finite(self._network.dtype_name, len(seq.ids))
            return GenerateResult(index, (), reason, fault)
        # The end token has a log-probability too, and is no part of the answer.
        log_probs = seq.log_probs[: len(seq.ids)] if seq.request.log_probs else ()
        return GenerateResult(
            index, tuple(seq.ids), reason, log_probs=tuple(log_probs), forced=sum(seq.given)
        )

    def _handle_out_of_memory(self, batch: Batch) -> None:
        """Preempt all. Next, try a smaller prefill, then half as many sequences, then fail one.

        If that fails before a token was read, the arena is halved too. It is most of the memory,
        and fewer places for rows cost less speed than smaller and smaller forwards.
        """
        self._scheduler.undo(batch)
        self._read_tokens()
        self._network.release_memory()
        self._failures += 1
        prefills = [piece for piece in batch.pieces if piece.count > 1]
        tokens = sum(piece.count for piece in prefills)
        seq = (prefills or batch.pieces)[0].sequence
        if len(prefills) <= 1:
            seq.limits = seq.limits or replace(self._limits)
        arena_halved = self._failures > 1 and self._runner.halve()
        # A prefix is prefilled before the batch, in chunks too.
        chunk = max(tokens, *(len(admitted.prefix) for admitted in batch.admitted), 0)
        # A row's scores take more memory than a token: where most are rows, few tokens stay.
        if chunk >= len(batch.pieces) and self._limits.halve_chunk(chunk):
            pass
        elif len(batch.pieces) > 1:
            self._limits.halve_slots(len(batch.pieces))
        elif self._failures > 1 and not arena_halved and not seq.done:
            # Not `done` by the token that was in flight.
            self._fail_without_room(seq)

    def _fail_without_room(self, seq: TokenSequence) -> None:
        device = self._network.device
        fault = f"not enough memory on {device} to generate for one row of {seq.length} tokens"
        seq.pending.call.deliver(GenerateResult(seq.request.index, (), "error", fault))
        self._scheduler.finish(seq)
        self._failures = 0
        if seq.limits is not None:
            self._limits.restore(seq.limits)
            self._runner.release()  # the next arena has its first size again
