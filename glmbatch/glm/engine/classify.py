"""Scores for one packed batch of classify requests after another: the trained head's, or those of whole labels.

Shapes: R tokens read, C hidden size, V tokens, M most continuations of any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from glmbatch.glm.engine.oom import within_memory
from glmbatch.glm.engine.protocol import ClassifyRequest, ClassifyResult
from glmbatch.glm.engine.queue import Job, Limits, WaitingLine, shared_prefix
from glmbatch.glm.model.label_tree import LabelTree, label_tree
from glmbatch.glm.model.network import Network
from glmbatch.glm.model.packing import Segment

# Rows of 65,024 float32 scores looked at together: 67 MB.
HEAD_ROWS = 256


@dataclass(slots=True, eq=False)
class _Question:
    job: Job[ClassifyRequest]
    prefix: tuple[int, ...]
    segment: Segment
    budget: int | None = None  # what a batch could hold before this prompt alone was too much


class Classification:
    """Classify requests that wait for the model, and the forward that answers a batch of them.

    `make_room` is asked when not even one row fits; it says whether it freed anything.
    """

    def __init__(self, network: Network, limits: Limits, make_room: Callable[[], bool]) -> None:
        self._network, self._limits = network, limits
        self._make_room = make_room
        self._line: WaitingLine[_Question] = WaitingLine(
            # Without padding the order costs nothing: first come, first served.
            rank=lambda question: (question.job.arrival,),
            tokens=lambda question: len(question.segment),
            group=lambda question: question.prefix,
            gone=lambda question: question.job.call.cancelled,
        )

    @property
    def busy(self) -> bool:
        return bool(self._line)

    def push(self, job: Job[ClassifyRequest]) -> None:
        prefix = shared_prefix(job.request)
        tree = None if job.request.label_ids is None else label_tree(job.request.label_ids)
        self._line.push(
            _Question(job, prefix, Segment(job.request.prompt_ids[len(prefix) :], tree))
        )

    def turn(self) -> None:
        """Answer one batch; on a full device, leave it for a smaller one."""
        batch = self._line.take(self._limits.batch_tokens)
        if not batch:
            return
        scores = within_memory(lambda: self._score(batch, self._limits.batch_tokens))
        if scores is None:
            self._back_off(batch)
            return
        for question, row in zip(batch, scores, strict=True):
            request = question.job.request
            error = (
                None
                if all(map(math.isfinite, row))
                else "the model's scores of this prompt are not finite"
            )
            question.job.call.deliver(
                ClassifyResult(request.index, () if error else tuple(row), error)
            )

    def _back_off(self, batch: Sequence[_Question]) -> None:
        self._network.give_back()
        first, tokens = batch[0], sum(len(question.segment) for question in batch)
        if len(batch) > 1:
            self._limits.halve_batch(tokens)
        elif not self._make_room():
            first.budget = first.budget or self._limits.batch_tokens
            if not self._limits.chunk_smaller(tokens):
                self._limits.batch_tokens = (
                    first.budget
                )  # the prompt's fault: the others need not pay for it
                request, device = first.job.request, self._network.device
                fault = f"no room on {device} for one prompt of {len(request.prompt_ids)} tokens"
                first.job.call.deliver(ClassifyResult(request.index, (), fault))
                return
        for question in batch:
            self._line.push(question)

    def _score(self, batch: Sequence[_Question], chunk_tokens: int) -> list[list[float]]:
        """Scores of each question; all are of one prefix. A prompt over the budget comes alone, and goes in chunks."""
        prefix = self._network.prefix(batch[0].prefix, chunk_tokens)
        segments = [question.segment for question in batch]
        if len(batch) == 1:
            segments[0], prefix = self._network.shorten(segments[0], prefix, chunk_tokens)
        hidden_RC = self._network.read(segments, prefix)
        if self._network.has_head:
            scores: list[list[float]] = self._network.class_logits(hidden_RC).tolist()
            return scores
        return _label_scores(
            self._network, [question.segment.tree for question in batch], hidden_RC
        )


def _label_scores(
    network: Network, trees: Sequence[LabelTree | None], hidden_RC: torch.Tensor
) -> list[list[float]]:
    """For each tree, the log-likelihood of each of its labels as asked; R as `Network.read` orders it."""
    known = [tree for tree in trees if tree is not None]
    children = [tree.children[0] for tree in known] + [
        after for tree in known for after in tree.children[1:]
    ]
    log_probs_RM = _log_probs(network, hidden_RC, children)
    scores = []
    first_node = len(known)
    for at, tree in enumerate(known):
        rows = [log_probs_RM[at], *log_probs_RM[first_node : first_node + len(tree)]]
        scores.append([math.fsum(rows[row][child] for row, child in path) for path in tree.paths])
        first_node += len(tree)
    return scores


def _log_probs(
    network: Network, hidden_RC: torch.Tensor, children: Sequence[Sequence[int]]
) -> list[list[float]]:
    """For each row the log-probability of each token of `children`; what follows those means nothing."""
    most = max(map(len, children))
    tokens_RM = torch.tensor(
        [[*tokens, *[0] * (most - len(tokens))] for tokens in children], device=network.device
    )
    picked = []
    for first in range(0, len(hidden_RC), HEAD_ROWS):
        rows = slice(first, first + HEAD_ROWS)
        logits_RV = network.token_logits(hidden_RC[rows])
        picked.append(logits_RV.gather(1, tokens_RM[rows]) - logits_RV.logsumexp(-1, keepdim=True))
    log_probs_RM: list[list[float]] = torch.cat(picked).tolist()
    return log_probs_RM
