"""Which sequences run next: every one gets its places, and a long one costs only itself."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.engine.queue import (
    Call,
    Limits,
    PendingRequest,
    TokenSequence,
    in_families,
    shared_prefix,
)
from glmbatch.glm.engine.scheduler import Batch, Scheduler
from glmbatch.glm.model.places import Places

POSITIONS = 4000


class Run:
    """Runs a scheduler as the engine does, with 7 for every token, up to one forward ahead."""

    def __init__(
        self, slots: int, places: int, budget: int = 512, *, ahead: bool = False, trained: int = 0
    ) -> None:
        self.scheduler = Scheduler(POSITIONS, trained, eos_id=2)
        self.trained = trained
        self.scheduler.places = Places(places)
        self.limits = Limits(budget, slots)
        self.ahead = ahead
        self.forwards: list[tuple[int, int]] = []  # rows of one token, tokens of prompts
        self.finished: dict[int, list[int]] = {}
        self.arena: list[tuple[int, int] | None] = [None] * places  # whose token, and which
        self._arrival = 0

    def push(self, prompt: int, answer: int, beside: int = 0, ending: int = 0) -> Call[object]:
        """A request with others beside it, each with `ending` more tokens than the one before."""
        call: Call[object] = Call()  # type: ignore[type-var]
        request = GenerateRequest(self._arrival, [5] * prompt, answer)
        others = []
        for n in range(1, beside + 1):
            ids = [5] * prompt + [6] * (ending * n)
            others.append(replace(request, index=1000 * n + self._arrival, prompt_ids=ids))
        request = replace(request, beside=tuple(others))
        self.scheduler.push(PendingRequest(call, request, self._arrival))
        self._arrival += 1
        return call

    def to_the_end(self) -> None:
        previous: Batch | None = None
        while self.scheduler.busy or previous is not None:
            batch = self.step()
            if not batch.pieces and previous is None:
                assert not self.scheduler.busy, "nothing runs and nothing is read"
            if self.ahead:  # the tokens of the forward before are read after this one is launched
                read, previous = previous, batch if batch.pieces else None
            else:
                read = batch
            if read is not None:
                self.read(read)

    def step(self) -> Batch:
        batch = self.scheduler.schedule(self.limits)
        self.check_places()
        self.write(batch)
        if batch.pieces:
            prompts = sum(piece.count for piece in batch.pieces if piece.count > 1)
            self.forwards.append((sum(piece.count == 1 for piece in batch.pieces), prompts))
            assert prompts <= self.limits.batch_tokens
        return batch

    def write(self, batch: Batch) -> None:
        """Copy and write tokens as the runner does; each piece finds those before it."""
        for source, target, places in batch.moves:
            self.arena[target : target + places] = self.arena[source : source + places]
        for seq in batch.admitted:
            for at in range(self.trained):
                self.arena[seq.start + at] = (-1, at)
        for piece in batch.pieces:
            seq = piece.sequence
            for at in range(piece.first, piece.first + piece.count):
                self.arena[seq.start + self.trained + at] = self.owned(seq, at)
        for piece in batch.pieces:
            start = piece.sequence.start
            for at in range(self.trained):
                assert self.arena[start + at] == (-1, at)
            for at in range(piece.first):
                assert self.arena[start + self.trained + at] == self.owned(piece.sequence, at)

    def owned(self, seq: TokenSequence, at: int) -> tuple[int, int]:
        """Token `at` of the sequence, which may be that of its family."""
        return (seq.pending.arrival if at < seq.shared else seq.request.index), at

    def read(self, batch: Batch) -> None:
        for piece in batch.pieces:
            seq = piece.sequence
            if not piece.samples or seq.done:
                continue
            seq.in_flight -= 1
            seq.ids.append(7)
            if len(seq.ids) >= seq.request.max_tokens or seq.length >= POSITIONS:
                self.scheduler.finish(seq)
                self.finished[seq.request.index] = seq.ids

    def check_places(self) -> None:
        """No two sequences share a place, and each has room for its tokens."""
        owned = sorted((seq.start, seq.start + seq.room, seq.cached) for seq in self.running())
        after = [start for start, _, _ in owned[1:]]
        for (start, end, cached), later in zip(owned, [*after, 10**9][: len(owned)], strict=True):
            assert start >= 0
            assert start + self.trained + cached <= end <= later

    def running(self) -> list[TokenSequence]:
        return self.scheduler.running


def test_a_long_sequence_costs_only_itself() -> None:
    rng = random.Random(0)
    answers = [rng.randint(10, 16) for _ in range(400)]

    def forwards(long_prompt: int | None) -> int:
        run = Run(slots=16, places=16 * 128)
        for at, answer in enumerate(answers):
            run.push(long_prompt if at == 100 and long_prompt else 20, answer)
        run.to_the_end()
        assert len(run.finished) == 400
        return len(run.forwards)

    assert forwards(200) <= 1.05 * forwards(None)


def test_prompts_are_read_beside_decode_steps() -> None:
    run = Run(slots=32, places=32 * 300)
    for at in range(500):
        run.push(40, 5 + at % 50)
    run.to_the_end()
    alone = [rows for rows, tokens in run.forwards if tokens and not rows]
    assert len(alone) == 1, "only the first prompts are read without decode steps"
    least = sum(5 + at % 50 for at in range(500)) / 32
    assert len(run.forwards) < 1.2 * least


@pytest.mark.parametrize("ahead", [False, True])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_sequence_ends_and_frees_its_places(ahead: bool, data: st.DataObject) -> None:
    run = Run(
        slots=data.draw(st.integers(1, 6)),
        places=data.draw(st.integers(180, 900)),
        budget=data.draw(st.integers(8, 100)),
        ahead=ahead,
        trained=data.draw(st.sampled_from([0, 3])),
    )
    row = st.tuples(st.integers(1, 70), st.integers(1, 80), st.sampled_from([0, 0, 1, 4]))
    rows = data.draw(st.lists(row, max_size=12))
    cancelled = data.draw(st.sets(st.integers(0, 11)))
    ending = data.draw(st.integers(0, 2))
    calls = [run.push(*row, ending) for row in rows]
    for at in cancelled & set(range(len(calls))):
        calls[at].cancelled = True
    run.to_the_end()
    expected = {}
    for at, (_, answer, beside) in enumerate(rows):
        if at not in cancelled:
            expected |= {1000 * n + at: answer for n in range(beside + 1)}
    assert {at: len(ids) for at, ids in run.finished.items()} == expected
    total = run.scheduler.places.total
    assert run.scheduler.places.take(total) == 0, "all places are free again"


def test_what_requests_begin_with_is_read_once() -> None:
    def prompt_tokens(beside: int) -> int:
        run = Run(slots=40, places=40 * 300)
        for _ in range(8):
            run.push(100, 20, beside)
        run.to_the_end()
        assert len(run.finished) == 8 * (beside + 1)
        assert len(run.forwards) <= 23, "the others run one forward later"
        return sum(tokens for _, tokens in run.forwards)

    assert prompt_tokens(0) == 800
    assert prompt_tokens(4) == 8 * 99


def asked_together(*requests: tuple[list[int], int]) -> list[tuple[int, int, int]]:
    """For each request of ids and shared tokens: its index, those of its family, its prefix."""
    asked = []
    for index, (ids, shared) in enumerate(requests):
        asked.append(GenerateRequest(index, ids, 9, shared_tokens=shared))
    call: Call[object] = Call()  # type: ignore[type-var]
    first = replace(asked[0], beside=tuple(asked[1:]))
    found = []
    for own, family in in_families(PendingRequest(call, first, 0)):
        prefix = len(shared_prefix(own.request))
        found.append((own.request.index, family.tokens if family else 0, prefix))
    return sorted(found)


def test_draws_are_read_once_beside_another_prompt() -> None:
    text = [5] * 120
    draws = [(text, 0)] * 4
    assert asked_together(*draws, ([5] * 18 + [6] * 99, 0)) == [
        *[(index, 119, 0) for index in range(4)],
        (4, 0, 0),
    ]
    other = [6] * 80
    found = asked_together((text, 0), (other, 0), (text, 0), (other, 0))
    assert [tokens for _, tokens, _ in found] == [119, 79, 119, 79]


def test_a_family_has_one_cached_beginning() -> None:
    text = [5] * 120
    found = asked_together((text, 50), ([*text, 6], 20), ([*text, 7], 90))
    assert found == [(0, 119, 20), (1, 119, 20), (2, 119, 20)]
    # What the templates share is cached anyway, so these have nothing to read together.
    apart = asked_together(([5] * 50 + [6] * 70, 50), ([5] * 50 + [7] * 70, 50))
    assert apart == [(0, 0, 50), (1, 0, 50)]


def test_a_preempted_sequence_keeps_its_ids() -> None:
    run = Run(slots=2, places=620)
    run.push(50, 500)
    run.push(50, 400)
    run.to_the_end()
    assert {at: len(ids) for at, ids in run.finished.items()} == {0: 500, 1: 400}
    prompt_tokens = sum(tokens for _, tokens in run.forwards)
    assert prompt_tokens > 100, "one was preempted and read again"


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=60))
def test_places_are_taken_once_and_given_back(steps: list[tuple[bool, int]]) -> None:
    places = Places(100)
    taken: list[tuple[int, int]] = []
    for gives_back, size in steps:
        if gives_back and taken:
            places.give_back(*taken.pop(size % len(taken)))
        elif taken and size % 3 == 0 and places.extend(sum(taken[-1]), size):
            taken[-1] = (taken[-1][0], taken[-1][1] + size)
        elif (start := places.take(size)) is not None:
            taken.append((start, size))
        owned = [place for start, length in taken for place in range(start, start + length)]
        assert len(owned) == len(set(owned))
        assert all(0 <= place < 100 for place in owned)
    for start, length in taken:
        places.give_back(start, length)
    assert places.take(100) == 0


def test_no_sequence_is_preempted_while_places_suffice() -> None:
    run = Run(slots=2, places=400)
    run.push(10, 100)
    run.read(run.step())
    run.push(10, 2000)
    run.read(run.step())
    (long,) = (seq for seq in run.running() if seq.request.max_tokens == 2000)
    while long.length < 290:  # beside 110 places of others, fewer than it asks for at a time
        if len(run.running()) == 1:
            run.push(10, 100)
        run.read(run.step())
        assert long in run.running()


def test_a_sequence_that_outgrows_the_arena_lets_others_in() -> None:
    run = Run(slots=1, places=100)
    run.push(60, 500)
    while run.running() == [] or run.running()[0].length < 100:
        run.read(run.step())
    run.push(5, 600)  # goes first in the queue, as it may be longer
    run.read(run.step())
    batch = run.step()
    assert [piece.sequence.request.index for piece in batch.pieces] == [1]
