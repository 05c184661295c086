"""What waits and runs: calls, pending requests and sequences, their limits, and a waiting queue.

No tensors, no threads.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    FormState,
    GenerateRequest,
    GenerateResult,
)

if TYPE_CHECKING:  # not at run time, as it loads torch
    from glmbatch.glm.engine.sampler import Sampler

logger = logging.getLogger(__name__)

# Prefill chunks are not halved below this: if they do not fit in memory, no prompt does.
MIN_CHUNK_TOKENS = 32
# A prefix shorter than this costs more in its own forward than it saves.
MIN_SHARED_TOKENS = 16

Request = TypeVar("Request", ClassifyRequest, GenerateRequest)
Result = TypeVar("Result", ClassifyResult, GenerateResult)


class Call(Generic[Result]):
    """One call of `classify` or `generate`, and its results on their way from the worker.

    `cancelled` tells the worker that the caller no longer waits for results.
    """

    def __init__(self) -> None:
        # One queue per call, so that callers never wait for each other's results.
        self.results: SimpleQueue[Result | Exception] = SimpleQueue()
        self.cancelled = False

    def deliver(self, result: Result) -> None:
        """Put `result` in the caller's queue."""
        self.results.put(result)

    def fail(self, error: Exception) -> None:
        """Raise `error` in the caller, after the results that were delivered before it."""
        self.cancelled = True
        self.results.put(error)


@dataclass(frozen=True, slots=True, eq=False)
class PendingRequest(Generic[Request]):
    """One request of a call. `arrival` numbers all requests of an engine in order of arrival."""

    call: Call[Any]
    request: Request
    arrival: int


@dataclass(slots=True)
class Limits:
    """Limits of one batch: its tokens, its slots (rows generated at once), and the memory of keys.

    They are lowered when the device runs out of memory.
    """

    batch_tokens: int
    slots: int
    cache_bytes: int = 0

    def halve_batch(self, tokens: int) -> None:
        """Halve the token budget after a batch of `tokens` tokens was too large."""
        # Half of the batch, because the budget may be far above what the batch used.
        self.batch_tokens = max(1, min(self.batch_tokens, tokens) // 2)
        logger.warning("out of memory: batches now have at most %d tokens", self.batch_tokens)

    def halve_chunk(self, tokens: int) -> bool:
        """Halve the token budget for one prompt of `tokens`; returns False at its minimum."""
        if min(tokens, self.batch_tokens) <= MIN_CHUNK_TOKENS:
            return False
        self.halve_batch(tokens)
        return True

    def halve_slots(self, slots: int) -> None:
        """Halve the number of slots after `slots` slots were too many."""
        self.slots = max(1, min(self.slots, slots) // 2)
        logger.warning("out of memory: now at most %d rows are generated at once", self.slots)

    def restore(self, earlier: Limits) -> None:
        """Go back to `earlier`: only one row was too long, and it has failed."""
        self.batch_tokens = earlier.batch_tokens
        self.slots = earlier.slots
        self.cache_bytes = earlier.cache_bytes


@dataclass(slots=True, eq=False)
class Family:
    """Sequences whose prompts begin with the same `tokens` ids, which one of them reads for all.

    They wait as one, as long as the longest of them: `max_tokens`, then tokens of the prompt.
    """

    tokens: int
    longest: tuple[int, int]
    members: list[TokenSequence] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class TokenSequence:
    """One request, the ids generated for it so far, and its places in the arena.

    The sequences of a `family` are numbered by `member`.
    `cached` is the number of its tokens whose keys and values are in the arena, or will be after
    the forwards that were launched. `in_flight` counts tokens that were launched but not read.
    """

    pending: PendingRequest[GenerateRequest]
    prefix: tuple[int, ...]
    sampler: Sampler | None
    writing: FormState | None = None  # of a request with a form
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    start: int = 0
    room: int = 0
    cached: int = 0
    in_flight: int = 0
    row: int = -1  # its row in the forward launched last
    done: bool = False
    given: list[bool] = field(default_factory=list)  # for each of `ids`: the form gave it
    void: bool = False  # the token in flight is dropped: ids were forced before it
    fault: str | None = None  # why its form could not go on
    limits: Limits | None = None  # before they were lowered for this sequence
    family: Family | None = None
    member: int = 0

    @property
    def shared(self) -> int:
        """Tokens of the prompt with which those of its family begin too."""
        return 0 if self.family is None else self.family.tokens

    @property
    def request(self) -> GenerateRequest:
        """The request."""
        return self.pending.request

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer read so far."""
        return len(self.request.prompt_ids) + len(self.ids)

    def replace_end(self, dropped: int, ids: Sequence[int]) -> None:
        """Drop the last `dropped` ids, then add the forced `ids`, which are known tokens.

        A token in flight was chosen without them, so it is dropped when it is read.
        """
        if not dropped and not ids:
            return
        kept = len(self.ids) - dropped
        self.ids[kept:] = ids
        self.given[kept:] = [True] * len(ids)
        self.log_probs[kept:] = [math.nan] * len(ids)
        self.cached = min(self.cached, len(self.request.prompt_ids) + kept)
        self.void = self.in_flight > 0


def shared_prefix(request: ClassifyRequest | GenerateRequest) -> tuple[int, ...]:
    """The leading ids of `request` whose keys and values are cached and shared; may be empty.

    They depend on the request alone, so that a row is computed in the same pieces in every batch.
    At least one id is left for the batch, because the answer is read at the last one.
    """
    shared = min(request.shared_tokens, len(request.prompt_ids) - 1)
    if shared < MIN_SHARED_TOKENS:
        return ()
    return tuple(request.prompt_ids[:shared])


def common_ids(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (mine, its) in pairs if mine != its), min(len(one), len(other)))


class Joinable(Protocol):
    """Requests that may be read together: what that costs, and whether it may be done."""

    @property
    def cost(self) -> float:
        """What reading them costs, in tokens of a prompt."""

    @property
    def fits(self) -> bool:
        """Whether enough is read once, and not too much at a time."""

    def joined(self, other: Self) -> Self:
        """These and those of `other`."""


Joined = TypeVar("Joined", bound=Joinable)


def joined_where_cheaper(alone: Iterable[Joined]) -> list[Joined]:
    """Each joins the first of those before it with which it costs less than apart."""
    found: list[Joined] = []
    for one in alone:
        for place, other in enumerate(found):
            both = other.joined(one)
            if both.fits and both.cost < other.cost + one.cost:
                found[place] = both
                break
        else:
            found.append(one)
    return found


@dataclass(frozen=True, slots=True)
class _Kin:
    """Requests whose prompts begin with the same `tokens` ids; `cached` of them are cached.

    Each prompt keeps an id of its own, because an answer begins behind the last one.
    """

    requests: tuple[GenerateRequest, ...]
    tokens: int
    cached: int

    @classmethod
    def of(cls, request: GenerateRequest) -> _Kin:
        return cls((request,), len(request.prompt_ids) - 1, len(shared_prefix(request)))

    def joined(self, other: _Kin) -> _Kin:
        """These and those of `other`, with one cached beginning, so that each reads alike."""
        both = (*self.requests, *other.requests)
        shared = min(request.shared_tokens for request in both)
        requests = tuple(replace(request, shared_tokens=shared) for request in both)
        common = common_ids(self.requests[0].prompt_ids, other.requests[0].prompt_ids)
        tokens = min(self.tokens, other.tokens, common)
        return _Kin(requests, tokens, len(shared_prefix(requests[0])))

    @property
    def cost(self) -> int:
        """Tokens of the prompts to read."""
        own = sum(len(request.prompt_ids) - self.tokens for request in self.requests)
        return self.tokens - self.cached + own

    @property
    def fits(self) -> bool:
        """Whether enough is read once to be copied."""
        return self.tokens - self.cached >= MIN_SHARED_TOKENS


def in_families(
    pending: PendingRequest[GenerateRequest],
) -> Iterator[tuple[PendingRequest[GenerateRequest], Family | None]]:
    """A request and those beside it, each alone and with its family, if any.

    A request joins another where that reads fewer tokens than apart. It depends on these requests
    alone.
    """
    requests = (replace(pending.request, beside=()), *pending.request.beside)
    found = joined_where_cheaper(map(_Kin.of, requests))
    for kin in found:
        family = None
        if len(kin.requests) > 1:
            longest = max((each.max_tokens, len(each.prompt_ids)) for each in kin.requests)
            family = Family(kin.tokens, longest)
        for request in kin.requests:
            yield PendingRequest(pending.call, request, pending.arrival), family


Item = TypeVar("Item")


class WaitingQueue(Generic[Item]):
    """A priority queue, smallest `rank` first, that hands out batches within a token budget.

    A batch has items of one `group` only. `rank` must be unique. Items for which `cancelled` is
    true are dropped.
    """

    def __init__(
        self,
        *,
        rank: Callable[[Item], tuple[int, ...]],
        tokens: Callable[[Item], int],
        group: Callable[[Item], Hashable],
        cancelled: Callable[[Item], bool],
    ) -> None:
        self._rank = rank
        self._tokens = tokens
        self._group = group
        self._cancelled = cancelled
        # One heap per group, because a batch shares one prefix.
        self._heaps: dict[Hashable, list[tuple[tuple[int, ...], int, Item]]] = {}

    def __bool__(self) -> bool:
        return bool(self._heaps)

    def push(self, item: Item) -> None:
        """Add `item`, or put it back; its rank determines its place."""
        heap = self._heaps.setdefault(self._group(item), [])
        heapq.heappush(heap, (self._rank(item), self._tokens(item), item))

    def take(self, budget: int) -> list[Item]:
        """Remove and return the first items of the first item's group, within `budget` tokens.

        The first item is taken even if it exceeds the budget alone. Returns [] if nothing waits.
        """
        batch: list[Item] = []
        # A group with only cancelled items yields an empty batch; then the next group is tried.
        while self._heaps and not batch:
            group = min(self._heaps, key=lambda group: self._heaps[group][0][0])
            heap = self._heaps[group]
            while heap:
                _, tokens, item = heap[0]
                if not self._cancelled(item):
                    if batch and tokens > budget:
                        break
                    batch.append(item)
                    budget -= tokens
                heapq.heappop(heap)
            if not heap:
                del self._heaps[group]
        return batch
