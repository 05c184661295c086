"""Runs classify requests in packed batches: logits of the trained head, or scores of whole labels.

The questions about one text are branches of one tree behind it, so it is read once for all of them.

Shapes: B rows with one tree, K tokens whose final states are read, C hidden size, V tokens, S reads
of a label tree, R reads of a batch, M the largest number of children, Q questions, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    common_ids,
    joined_where_cheaper,
    shared_prefix,
)
from glmbatch.glm.engine.runner import Readback
from glmbatch.glm.model.label_tree import Branch, LabelTree, label_tree, question_scores
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.packing import PackedPrompt
from glmbatch.glm.model.rows import IntArray, to_device
from glmbatch.glm.oom import catch_oom

# Rows of logits computed at once: 67 MB for 65,024 tokens in float32.
HEAD_ROWS = 256
# Tokens of all questions behind a text, at most: their mask has as many rows and columns.
MAX_BEHIND = 1024
# A token behind a text costs as much as so many of a prompt, since a mask hides other branches: on
# CPU 1.2 to 1.4.
BEHIND_COST = 1.5


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
            # Trees of about one size, since they are padded to the largest on a GPU.
            group=lambda row: (row.prefix, len(_tree_of(row)).bit_length()),
            cancelled=lambda row: row.call.cancelled,
        )

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or self._in_flight is not None

    def push(self, pending: PendingRequest[ClassifyRequest]) -> None:
        """Add a request to the waiting queue, with the questions beside it."""
        for group in read_together(pending.request):
            self._wait(pending.call, pending.arrival, group)

    def _wait(self, call: Call[Any], arrival: int, group: Group) -> None:
        prefix = shared_prefix(group.text)
        tree = label_tree(group.branches())
        prompt = PackedPrompt(group.text.prompt_ids[len(prefix) :], tree)
        # The index tells apart the rows of one request.
        rank = (arrival, group.text.index)
        self._waiting.push(_Row(call, rank, group.questions, prefix, prompt))

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
        read_RM = np.array(read)
        for tree, rows, reads_BS in _by_tree(batch):
            scores_QBL = question_scores(tree, read_RM[reads_BS], self._network.has_head)
            for row, *scores_QL in zip(rows, *scores_QBL, strict=True):
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
            self._wait(row.call, row.rank[0], Group.of(question))

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

        All rows have the same prefix. One over the token budget is a batch of its own and is
        prefilled in chunks.
        """
        chunk_tokens = self._limits.batch_tokens
        prefix = self._network.cached_prefix(batch[0].prefix, chunk_tokens)
        prompts = [row.prompt for row in batch]
        if len(batch) == 1:
            prompts[0], prefix = self._network.prefill_ahead(prompts[0], prefix, chunk_tokens)
        hidden_KC = self._network.prefill(prompts, prefix)
        reads = []
        first = 0
        for row in batch:
            reads += [first + read for read in _tree_of(row).reads]
            first += 1 + len(_tree_of(row))
        (reads_R,) = to_device(self._network.device, np.array(reads))
        if self._network.has_head:
            return Readback(self._network.class_logits(hidden_KC[reads_R]))
        trees = [_tree_of(row) for row in batch]
        return Readback(_log_probs(self._network, trees, hidden_KC[reads_R]))


@dataclass(frozen=True, slots=True)
class Group:
    """Questions that are read together. `text` is a request for what all of them begin with."""

    questions: tuple[ClassifyRequest, ...]
    text: ClassifyRequest

    @classmethod
    def of(cls, question: ClassifyRequest) -> Group:
        """The question alone."""
        return cls((question,), question)

    def joined(self, other: Group) -> Group:
        """The questions of both."""
        common = common_ids(self.text.prompt_ids, other.text.prompt_ids)
        text = replace(
            self.text,
            prompt_ids=self.text.prompt_ids[:common],
            shared_tokens=min(self.text.shared_tokens, other.text.shared_tokens),
        )
        return Group((*self.questions, *other.questions), text)

    def branches(self) -> tuple[Branch, ...]:
        """What follows the text in each question."""
        common = len(self.text.prompt_ids)
        return tuple((tuple(each.prompt_ids[common:]), each.label_ids) for each in self.questions)

    @property
    def fits(self) -> bool:
        """Whether a tree behind the text is worth it, and not too large; without what is cached."""
        return self._text_tokens >= MIN_SHARED_TOKENS and self._behind <= MAX_BEHIND

    @property
    def cost(self) -> float:
        """What reading the group costs, in tokens of a prompt: without what is cached."""
        return self._text_tokens + BEHIND_COST * self._behind

    @property
    def _text_tokens(self) -> int:
        return len(self.text.prompt_ids) - len(shared_prefix(self.text))

    @property
    def _behind(self) -> int:
        # What some of them share there counts for each.
        common = len(self.text.prompt_ids)
        return sum(len(question.prompt_ids) - common for question in self.questions)


def read_together(request: ClassifyRequest) -> list[Group]:
    """The request and those beside it in groups: what a group begins with is read once.

    A question joins where that costs less than reading it apart. What the template puts first is
    cached either way. Answers depend on the groups only by rounding, and the groups on this request
    alone.
    """
    return joined_where_cheaper(map(Group.of, (request, *request.beside)))


def _tree_of(row: _Row) -> LabelTree:
    tree = row.prompt.tree
    assert tree is not None
    return tree


def _by_tree(batch: Sequence[_Row]) -> Iterator[tuple[LabelTree, list[_Row], IntArray]]:
    """The rows of each tree, and the places of their reads among those of the batch, [B, S].

    Trees are cached, so rows with the same questions have the same one.
    """
    rows: dict[int, list[_Row]] = {}
    firsts: dict[int, list[int]] = {}
    first = 0
    for row in batch:
        tree = _tree_of(row)
        rows.setdefault(id(tree), []).append(row)
        firsts.setdefault(id(tree), []).append(first)
        first += len(tree.reads)
    for key, alike in rows.items():
        tree = _tree_of(alike[0])
        yield tree, alike, np.array(firsts[key])[:, None] + np.arange(len(tree.reads))


def _log_probs(
    network: Network, trees: Sequence[LabelTree], hidden_RC: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of the children of each read, [R, M]; the reads of all `trees` in order."""
    width = max(max(map(len, tree.children)) for tree in trees)
    padded = {}
    for tree in trees:
        if id(tree) not in padded:
            tokens_SM = np.zeros((len(tree.children), width), np.int64)
            for tokens_M, tokens in zip(tokens_SM, tree.children, strict=True):
                tokens_M[: len(tokens)] = tokens
            padded[id(tree)] = tokens_SM
    (tokens_RM,) = to_device(network.device, np.concatenate([padded[id(tree)] for tree in trees]))
    parts = []
    # In parts, because the logits of all reads would take far more memory than the batch itself.
    for first in range(0, len(hidden_RC), HEAD_ROWS):
        part = slice(first, first + HEAD_ROWS)
        logits_RV = network.token_logits(hidden_RC[part])
        parts.append(logits_RV.gather(1, tokens_RM[part]) - logits_RV.logsumexp(-1, keepdim=True))
    return torch.cat(parts)
