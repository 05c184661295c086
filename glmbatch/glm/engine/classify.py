"""Runs classify requests in packed batches: logits of the trained head, or scores of whole labels.

The questions about one text are branches of one tree behind it, so it is read once for all of them.

Shapes: B rows of a batch, K tokens whose final states are read, C hidden size, V tokens, S reads of
the label tree, M the largest number of its children, R rows and reads, Q questions, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from glmbatch.glm.engine.generate import Generation
from glmbatch.glm.engine.protocol import ClassifyRequest, ClassifyResult, not_finite
from glmbatch.glm.engine.queue import (
    MIN_SHARED_TOKENS,
    Call,
    Limits,
    PendingRequest,
    WaitingQueue,
    shared_prefix,
)
from glmbatch.glm.engine.runner import Readback
from glmbatch.glm.model.label_tree import Branch, LabelTree, label_tree, question_scores
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.packing import PackedPrompt
from glmbatch.glm.model.rows import to_device
from glmbatch.glm.oom import catch_oom

# Rows of logits computed at once: 67 MB for 65,024 tokens in float32.
HEAD_ROWS = 256
# Tokens of all questions behind a text, at most: their mask has as many rows and columns.
MAX_BEHIND = 1024


@dataclass(slots=True, eq=False)
class _Row:
    """The questions that wait to be read together: their shared prefix, and the rest of them.

    `prompt` is what all of them begin with, after the prefix; its tree has a branch for each.
    """

    call: Call[Any]
    rank: tuple[int, ...]
    questions: Sequence[ClassifyRequest]
    prefix: tuple[int, ...]
    prompt: PackedPrompt
    limits: Limits | None = None  # before they were lowered for this row alone


class Classification:
    """The waiting queue of classify requests, and the forward that answers a batch of them.

    `generation` gives its memory up: while it is idle, or else if not even one prompt fits.
    """

    def __init__(self, network: Network, limits: Limits, generation: Generation) -> None:
        self._network = network
        self._limits = limits
        self._generation = generation
        # A batch whose scores are not read yet. On CPU they are there when it returns.
        self._in_flight: tuple[Sequence[_Row], Readback] | None = None
        self._runs_ahead = network.device.type == "cuda"
        self._waiting: WaitingQueue[_Row] = WaitingQueue(
            # First come, first served: without padding, no order is faster.
            rank=lambda row: row.rank,
            tokens=lambda row: len(row.prompt),
            # Trees are cached, so requests with the same questions have the same one.
            group=lambda row: (row.prefix, id(row.prompt.tree)),
            cancelled=lambda row: row.call.cancelled,
        )

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or self._in_flight is not None

    def push(self, pending: PendingRequest[ClassifyRequest]) -> None:
        """Add a request to the waiting queue, with the questions beside it."""
        for questions in read_together(pending.request):
            self._wait(pending.call, pending.arrival, questions)

    def _wait(self, call: Call[Any], arrival: int, questions: Sequence[ClassifyRequest]) -> None:
        text, branches = _branches(questions)
        prefix = shared_prefix(text)
        prompt = PackedPrompt(text.prompt_ids[len(prefix) :], label_tree(branches))
        # The index tells apart the rows of one request.
        self._waiting.push(_Row(call, (arrival, text.index), questions, prefix, prompt))

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
        (read,) = readback.wait()
        scores_QBL = question_scores(_tree_of(batch), np.array(read), self._network.has_head)
        for row, *scores_QL in zip(batch, *scores_QBL, strict=True):
            self._answer(row, [scores_L.tolist() for scores_L in scores_QL])

    def _answer(self, row: _Row, scores_QL: Sequence[Sequence[float]]) -> None:
        is_finite = [all(map(math.isfinite, scores)) for scores in scores_QL]
        if not all(is_finite) and len(row.questions) > 1:
            # A question's overflow reaches all that are in its tree.
            self._separate(row)
            return
        for question, scores, finite in zip(row.questions, scores_QL, is_finite, strict=True):
            fault = None if finite else not_finite(self._network.dtype_name)
            row.call.deliver(ClassifyResult(question.index, tuple(scores) if finite else (), fault))

    def _separate(self, row: _Row) -> None:
        """Ask the questions of a row one by one."""
        for question in row.questions:
            self._wait(row.call, row.rank[0], [question])

    def _handle_out_of_memory(self, batch: Sequence[_Row]) -> None:
        """Take an idle arena, halve the batch, preempt generation, take chunks; then fail it."""
        self._network.release_memory()
        first = batch[0]
        tokens = sum(len(row.prompt) for row in batch)
        if self._generation.free_idle():
            pass
        elif len(batch) > 1:
            self._limits.halve_batch(tokens)
        else:
            first.limits = first.limits or replace(self._limits)
            # A prefix is prefilled before the batch, in chunks too.
            chunk = tokens + len(first.prefix)
            if not (self._generation.preempt() or self._limits.halve_chunk(chunk)):
                self._limits.restore(first.limits)
                self._give_up(first)
                return
        for row in batch:
            self._waiting.push(row)
        if len(batch) == 1:
            self.run_batch()  # before generation can take that memory again

    def _give_up(self, row: _Row) -> None:
        """Fail a row of one question, since it does not fit in memory; separate the others."""
        if len(row.questions) > 1:
            self._separate(row)
            return
        (request,) = row.questions
        length, device = len(request.prompt_ids), self._network.device
        fault = f"not enough memory on {device} for one prompt of {length} tokens"
        row.call.deliver(ClassifyResult(request.index, (), fault))

    def _launch(self, batch: Sequence[_Row]) -> Readback:
        """What is read behind each row: logits of the head, or log-probabilities of the labels.

        All rows have the same prefix and the same tree. One over the token budget is a batch of its
        own and is prefilled in chunks.
        """
        chunk_tokens = self._limits.batch_tokens
        prefix = self._network.cached_prefix(batch[0].prefix, chunk_tokens)
        prompts = [row.prompt for row in batch]
        if len(batch) == 1:
            prompts[0], prefix = self._network.prefill_ahead(prompts[0], prefix, chunk_tokens)
        hidden_KC = self._network.prefill(prompts, prefix)
        tree = _tree_of(batch)
        (reads_S,) = to_device(self._network.device, np.array(tree.reads))
        hidden_BSC = hidden_KC.view(len(batch), len(tree) + 1, -1)[:, reads_S]
        if self._network.has_head:
            logits_RL = self._network.class_logits(hidden_BSC.flatten(0, 1))
            return Readback(logits_RL.view(*hidden_BSC.shape[:2], -1))
        return Readback(_tree_log_probs(self._network, tree, hidden_BSC))


def read_together(request: ClassifyRequest) -> list[list[ClassifyRequest]]:
    """The request and those beside it in groups: what a group begins with is read once.

    It must be longer than the tokens that the template puts first, since those are cached. Answers
    depend on the groups only by rounding, and the groups on this request alone.
    """
    groups: list[list[ClassifyRequest]] = []
    for question in (request, *request.beside):
        for group in groups:
            members = [*group, question]
            common = _common(members)
            saved = common - min(member.shared_tokens for member in members)
            behind = sum(len(member.prompt_ids) - common for member in members)
            if saved >= MIN_SHARED_TOKENS and behind <= MAX_BEHIND:
                group.append(question)
                break
        else:
            groups.append([question])
    return groups


def _branches(questions: Sequence[ClassifyRequest]) -> tuple[ClassifyRequest, tuple[Branch, ...]]:
    """A request for what all `questions` begin with, and the branches that follow it."""
    common = _common(questions)
    text = replace(
        questions[0],
        prompt_ids=questions[0].prompt_ids[:common],
        shared_tokens=min(question.shared_tokens for question in questions),
    )
    return text, tuple((tuple(each.prompt_ids[common:]), each.label_ids) for each in questions)


def _common(questions: Sequence[ClassifyRequest]) -> int:
    """Number of ids that all `questions` begin with."""
    prompts = [question.prompt_ids for question in questions]
    if len(prompts) == 1:  # most requests: their ids are not looked at
        return len(prompts[0])
    columns = enumerate(zip(*prompts, strict=False))
    return next((at for at, ids in columns if ids.count(ids[0]) < len(ids)), min(map(len, prompts)))


def _tree_of(batch: Sequence[_Row]) -> LabelTree:
    tree = batch[0].prompt.tree
    assert tree is not None
    return tree


def _tree_log_probs(network: Network, tree: LabelTree, hidden_BSC: torch.Tensor) -> torch.Tensor:
    """For each row and read of the tree, log-probabilities of the children, [B, S, M]."""
    width = max(map(len, tree.children))
    padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in tree.children]
    (tokens_SM,) = to_device(network.device, np.array(padded))
    hidden_RC = hidden_BSC.flatten(0, 1)
    tokens_RM = tokens_SM.repeat(len(hidden_BSC), 1)
    parts = []
    # In parts, because the logits of all reads would take far more memory than the batch itself.
    for first in range(0, len(hidden_RC), HEAD_ROWS):
        rows = slice(first, first + HEAD_ROWS)
        logits_RV = network.token_logits(hidden_RC[rows])
        parts.append(logits_RV.gather(1, tokens_RM[rows]) - logits_RV.logsumexp(-1, keepdim=True))
    return torch.cat(parts).view(-1, *tokens_SM.shape)
