"""Runs classify requests in packed batches: logits of the trained head, or scores of whole labels.

Shapes: B prompts of a batch, K tokens whose final states are read, C hidden size, V tokens, N + 1
rows of the label tree (the prompt, then its nodes), M the largest number of children of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from glmbatch.glm.engine.protocol import ClassifyRequest, ClassifyResult, not_finite
from glmbatch.glm.engine.queue import Limits, PendingRequest, WaitingQueue, shared_prefix
from glmbatch.glm.engine.runner import Readback
from glmbatch.glm.model.label_tree import LabelTree, label_tree
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.packing import PackedPrompt
from glmbatch.glm.model.rows import to_device
from glmbatch.glm.oom import catch_oom

# Rows of logits computed at once: 67 MB for 65,024 tokens in float32.
HEAD_ROWS = 256


@dataclass(slots=True, eq=False)
class _Waiting:
    """One waiting request: its shared prefix, and the rest of it, for a packed batch."""

    pending: PendingRequest[ClassifyRequest]
    prefix: tuple[int, ...]
    prompt: PackedPrompt
    limits: Limits | None = None  # before they were lowered for this prompt alone


class Classification:
    """The waiting queue of classify requests, and the forward that answers a batch of them.

    `preempt_generation` is called if memory does not suffice for even one prompt; it returns
    whether it freed any.
    """

    def __init__(
        self, network: Network, limits: Limits, preempt_generation: Callable[[], bool]
    ) -> None:
        self._network = network
        self._limits = limits
        self._preempt_generation = preempt_generation
        # A batch whose scores are not read yet. On CPU they are there when it returns.
        self._in_flight: tuple[Sequence[_Waiting], Readback] | None = None
        self._runs_ahead = network.device.type == "cuda"
        self._waiting: WaitingQueue[_Waiting] = WaitingQueue(
            # First come, first served: without padding, no order is faster.
            rank=lambda item: (item.pending.arrival,),
            tokens=lambda item: len(item.prompt),
            # Trees are cached, so requests with the same labels have the same one.
            group=lambda item: (item.prefix, id(item.prompt.tree)),
            cancelled=lambda item: item.pending.call.cancelled,
        )

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or self._in_flight is not None

    def push(self, pending: PendingRequest[ClassifyRequest]) -> None:
        """Add a request to the waiting queue."""
        request = pending.request
        prefix = shared_prefix(request)
        tree = None if request.label_ids is None else label_tree(request.label_ids)
        prompt = PackedPrompt(request.prompt_ids[len(prefix) :], tree)
        self._waiting.push(_Waiting(pending, prefix, prompt))

    def run_batch(self) -> None:
        """Launch the next batch, then deliver the results of the one before.

        A batch that does not fit in memory is put back, and the limits are lowered.
        """
        batch = self._waiting.take(self._limits.batch_tokens)
        scores = catch_oom(lambda: self._launch(batch)) if batch else None
        self._deliver()
        if scores is not None:
            self._in_flight = (batch, scores)
        elif batch:
            self._handle_out_of_memory(batch)
        if not self._runs_ahead:
            self._deliver()

    def _deliver(self) -> None:
        """Wait for the scores in flight and deliver them."""
        if self._in_flight is None:
            return
        batch, readback = self._in_flight
        self._in_flight = None
        (rows,) = readback.wait()
        tree = batch[0].prompt.tree
        if tree is not None:
            rows = label_scores(tree, np.array(rows)).tolist()
        for item, row in zip(batch, rows, strict=True):
            index = item.pending.request.index
            if all(map(math.isfinite, row)):
                result = ClassifyResult(index, tuple(row))
            else:
                result = ClassifyResult(index, (), not_finite(self._network.dtype_name))
            item.pending.call.deliver(result)

    def _handle_out_of_memory(self, batch: Sequence[_Waiting]) -> None:
        """Next, try smaller batches, then preempt generation, then chunks; then fail the prompt."""
        self._network.release_memory()
        first = batch[0]
        tokens = sum(len(item.prompt) for item in batch)
        if len(batch) > 1:
            self._limits.halve_batch(tokens)
        else:
            first.limits = first.limits or replace(self._limits)
            # A prefix is prefilled before the batch, in chunks too.
            chunk = tokens + len(first.prefix)
            if not (self._preempt_generation() or self._limits.halve_chunk(chunk)):
                self._limits.restore(first.limits)
                request = first.pending.request
                length, device = len(request.prompt_ids), self._network.device
                fault = f"not enough memory on {device} for one prompt of {length} tokens"
                first.pending.call.deliver(ClassifyResult(request.index, (), fault))
                return
        for item in batch:
            self._waiting.push(item)
        if len(batch) == 1:
            self.run_batch()  # before generation can take that memory again

    def _launch(self, batch: Sequence[_Waiting]) -> Readback:
        """Logits of the head for each item, or log-probabilities of the tokens in its label tree.

        All items have the same prefix and the same tree. A prompt over the token budget is a batch
        of its own and is prefilled in chunks.
        """
        chunk_tokens = self._limits.batch_tokens
        prefix = self._network.cached_prefix(batch[0].prefix, chunk_tokens)
        prompts = [item.prompt for item in batch]
        if len(batch) == 1:
            prompts[0], prefix = self._network.prefill_ahead(prompts[0], prefix, chunk_tokens)
        hidden_KC = self._network.prefill(prompts, prefix)
        tree = prompts[0].tree
        if tree is None:
            return Readback(self._network.class_logits(hidden_KC))
        return Readback(_tree_log_probs(self._network, tree, hidden_KC))


def _tree_log_probs(network: Network, tree: LabelTree, hidden_KC: torch.Tensor) -> torch.Tensor:
    """For each prompt and row of the tree, log-probabilities of the children, [B, N + 1, M]."""
    width = max(map(len, tree.children))
    padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in tree.children]
    (tokens_NM,) = to_device(network.device, np.array(padded))
    tokens_KM = tokens_NM.repeat(len(hidden_KC) // len(tokens_NM), 1)
    parts = []
    # In parts, because the logits of all rows would take far more memory than the batch itself.
    for first in range(0, len(hidden_KC), HEAD_ROWS):
        rows = slice(first, first + HEAD_ROWS)
        logits_RV = network.token_logits(hidden_KC[rows])
        parts.append(logits_RV.gather(1, tokens_KM[rows]) - logits_RV.logsumexp(-1, keepdim=True))
    return torch.cat(parts).view(-1, *tokens_NM.shape)


def label_scores(tree: LabelTree, log_probs_BNM: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The log-likelihood of each label, [B, labels], in float64.

    Along a label's path the sum has one order, so scores do not depend on the order of the labels.
    """
    scores = []
    for path in tree.paths:
        rows, children = zip(*path, strict=True)
        scores.append(log_probs_BNM[:, rows, children].sum(axis=1, dtype=np.float64))
    return np.stack(scores, axis=1)
