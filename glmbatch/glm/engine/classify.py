"""Runs classify requests in packed batches: logits of the trained head, or scores of whole labels.

Shapes: R tokens whose final states are read, C hidden size, V tokens, M the largest number of
continuations of a read token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from glmbatch.glm.engine.oom import catch_oom
from glmbatch.glm.engine.protocol import ClassifyRequest, ClassifyResult, not_finite
from glmbatch.glm.engine.queue import Limits, PendingRequest, WaitingQueue, shared_prefix
from glmbatch.glm.model.label_tree import LabelTree, label_tree
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.packing import PackedPrompt

# Rows of logits computed at once: 67 MB for 65,024 tokens in float32.
HEAD_ROWS = 256


@dataclass(slots=True, eq=False)
class _Waiting:
    """One waiting request: its shared prefix, and the rest of it, for a packed batch."""

    pending: PendingRequest[ClassifyRequest]
    prefix: tuple[int, ...]
    prompt: PackedPrompt
    budget: int | None = None  # the token budget before it was lowered for this prompt alone


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
        self._waiting: WaitingQueue[_Waiting] = WaitingQueue(
            # First come, first served: without padding, no order is faster.
            rank=lambda item: (item.pending.arrival,),
            tokens=lambda item: len(item.prompt),
            group=lambda item: item.prefix,
            cancelled=lambda item: item.pending.call.cancelled,
        )

    @property
    def busy(self) -> bool:
        """Whether any request waits."""
        return bool(self._waiting)

    def push(self, pending: PendingRequest[ClassifyRequest]) -> None:
        """Add a request to the waiting queue."""
        request = pending.request
        prefix = shared_prefix(request)
        tree = None if request.label_ids is None else label_tree(request.label_ids)
        prompt = PackedPrompt(request.prompt_ids[len(prefix) :], tree)
        self._waiting.push(_Waiting(pending, prefix, prompt))

    def run_batch(self) -> None:
        """Answer one batch. If it does not fit in memory, put it back and lower the limits."""
        batch = self._waiting.take(self._limits.batch_tokens)
        if not batch:
            return
        scores = catch_oom(lambda: self._score(batch, self._limits.batch_tokens))
        if scores is None:
            self._handle_out_of_memory(batch)
            return
        for item, row in zip(batch, scores, strict=True):
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
        elif not self._preempt_generation():
            first.budget = first.budget or self._limits.batch_tokens
            if not self._limits.halve_chunk(tokens):
                # Only this prompt is too long: later ones get the original token budget back.
                self._limits.batch_tokens = first.budget
                request = first.pending.request
                length, device = len(request.prompt_ids), self._network.device
                fault = f"not enough memory on {device} for one prompt of {length} tokens"
                first.pending.call.deliver(ClassifyResult(request.index, (), fault))
                return
        for item in batch:
            self._waiting.push(item)

    def _score(self, batch: Sequence[_Waiting], chunk_tokens: int) -> list[list[float]]:
        """Scores of each item of `batch`; all items have the same prefix.

        A prompt over the token budget is a batch of its own and is prefilled in chunks.
        """
        prefix = self._network.cached_prefix(batch[0].prefix, chunk_tokens)
        prompts = [item.prompt for item in batch]
        if len(batch) == 1:
            prompts[0], prefix = self._network.prefill_ahead(prompts[0], prefix, chunk_tokens)
        hidden_RC = self._network.prefill(prompts, prefix)
        if self._network.has_head:
            scores: list[list[float]] = self._network.class_logits(hidden_RC).tolist()
            return scores
        return _label_scores(self._network, [item.prompt.tree for item in batch], hidden_RC)


def _label_scores(
    network: Network, trees: Sequence[LabelTree | None], hidden_RC: torch.Tensor
) -> list[list[float]]:
    """For each tree, the log-likelihood of each label, in the order of the request.

    `hidden_RC` is the result of `Network.prefill`.
    """
    asked = [tree for tree in trees if tree is not None]
    continuations = [tree.children[0] for tree in asked]
    for tree in asked:
        continuations += tree.children[1:]
    log_probs_RM = _log_probs(network, hidden_RC, continuations)
    scores = []
    first_node = len(asked)
    for prompt_row, tree in enumerate(asked):
        rows = [log_probs_RM[prompt_row], *log_probs_RM[first_node : first_node + len(tree)]]
        scores.append([_path_score(path, rows) for path in tree.paths])
        # The prompts are read first, then all nodes, tree by tree.
        first_node += len(tree)
    return scores


def _path_score(path: Sequence[tuple[int, int]], rows: Sequence[Sequence[float]]) -> float:
    # fsum rounds only once, so scores do not depend on the order of the labels.
    return math.fsum(rows[row][child] for row, child in path)


def _log_probs(
    network: Network, hidden_RC: torch.Tensor, continuations: Sequence[Sequence[int]]
) -> list[list[float]]:
    """For each row, the log-probability of each of its `continuations`, padded to M."""
    width = max(map(len, continuations))
    padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in continuations]
    tokens_RM = torch.tensor(padded, device=network.device)
    parts = []
    # In parts, because the logits of all rows would take far more memory than the batch itself.
    for first in range(0, len(hidden_RC), HEAD_ROWS):
        rows = slice(first, first + HEAD_ROWS)
        logits_RV = network.token_logits(hidden_RC[rows])
        parts.append(logits_RV.gather(1, tokens_RM[rows]) - logits_RV.logsumexp(-1, keepdim=True))
    log_probs_RM: list[list[float]] = torch.cat(parts).tolist()
    return log_probs_RM
