"""Who waits for the model and who goes next: calls, jobs and the waiting line. No tensors, no threads."""

from __future__ import annotations

import heapq
import logging
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
)

logger = logging.getLogger(__name__)

# A prompt is not read in chunks smaller than half of this: a device without room for them has none for the prompt.
MIN_CHUNK_TOKENS = 32
# A prefix shorter than this costs more in a forward of its own than it saves.
MIN_SHARED_TOKENS = 16


Request = TypeVar("Request", ClassifyRequest, GenerateRequest)
Result = TypeVar("Result", ClassifyResult, GenerateResult)


class Call(Generic[Result]):
    """One caller's results on their way from the worker; `cancelled` tells the worker that nobody waits any more."""

    def __init__(self) -> None:
        self.results: SimpleQueue[Result | Exception] = SimpleQueue()
        self.cancelled = False

    def deliver(self, result: Result) -> None:
        self.results.put(result)

    def fail(self, error: Exception) -> None:
        """Raise `error` in the caller, once what was delivered before it is taken."""
        self.cancelled = True
        self.results.put(error)


@dataclass(frozen=True, slots=True, eq=False)
class Job(Generic[Request]):
    """One request of one call; `arrival` numbers all requests of an engine."""

    call: Call[Any]
    request: Request
    arrival: int


@dataclass(slots=True)
class Limits:
    """How much the device is asked to hold at once; only ever lowered, when it turned out to be too much."""

    batch_tokens: int
    slots: int

    def halve_batch(self, tokens: int) -> None:
        """Remember that a forward of `tokens` was too large."""
        self.batch_tokens = max(1, min(self.batch_tokens, tokens) // 2)
        logger.warning("forwards now take at most %d tokens", self.batch_tokens)

    def chunk_smaller(self, tokens: int) -> bool:
        """Halve the batch for one prompt of `tokens`, which then comes in chunks; false when that cannot help it."""
        if min(tokens, self.batch_tokens) <= MIN_CHUNK_TOKENS:
            return False
        self.halve_batch(tokens)
        return True

    def halve_slots(self, rows: int) -> None:
        """Remember that generating for `rows` at once was too much."""
        self.slots = max(1, min(self.slots, rows) // 2)
        logger.warning("at most %d rows are now generated at once", self.slots)


def shared_prefix(request: ClassifyRequest | GenerateRequest) -> tuple[int, ...]:
    """The leading ids whose keys and values are computed once for all requests that begin with them.

    Decided by the request alone, so that a row is computed in the same pieces whatever its batch-mates. At least one
    id is left over: an answer is read at the last.
    """
    shared = min(request.shared_tokens, len(request.prompt_ids) - 1)
    return tuple(request.prompt_ids[:shared]) if shared >= MIN_SHARED_TOKENS else ()


Item = TypeVar("Item")


class WaitingLine(Generic[Item]):
    """Items in order of rank, smallest first, taken in batches of one group within a token budget.

    `rank` must differ from item to item. `gone` names the items that nobody waits for: they are never handed out.
    """

    def __init__(
        self,
        *,
        rank: Callable[[Item], tuple[int, ...]],
        tokens: Callable[[Item], int],
        group: Callable[[Item], Hashable],
        gone: Callable[[Item], bool],
    ) -> None:
        self._rank, self._tokens, self._group, self._gone = rank, tokens, group, gone
        self._heaps: dict[Hashable, list[tuple[tuple[int, ...], int, Item]]] = {}

    def __bool__(self) -> bool:
        return bool(self._heaps)

    def push(self, item: Item) -> None:
        heap = self._heaps.setdefault(self._group(item), [])
        heapq.heappush(heap, (self._rank(item), self._tokens(item), item))

    def take(self, budget: int, most: int = sys.maxsize) -> list[Item]:
        """Up to `most` items of the group that is first in line, together within `budget` tokens.

        The first is taken even when it alone is over the budget. Empty when nobody waits.
        """
        taken: list[Item] = []
        while self._heaps and not taken:
            group = min(self._heaps, key=lambda group: self._heaps[group][0][0])
            heap = self._heaps[group]
            while heap and len(taken) < most:
                _, tokens, item = heap[0]
                if not self._gone(item):
                    if taken and tokens > budget:
                        break
                    taken.append(item)
                    budget -= tokens
                heapq.heappop(heap)
            if not heap:
                del self._heaps[group]
        return taken
