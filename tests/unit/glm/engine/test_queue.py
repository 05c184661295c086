"""The waiting queue and the label tree, for any requests and any labels."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from glmbatch.glm.engine.queue import MIN_SHARED_TOKENS, Limits, WaitingQueue, shared_prefix
from glmbatch.glm.model.label_tree import Branch, LabelTree, label_tree

Item = tuple[int, int, int]  # arrival, tokens, group

items = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), max_size=60).map(
    lambda pairs: [(at, *pair) for at, pair in enumerate(pairs)]
)
labels = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple), min_size=1, max_size=8
).map(tuple)
branches = st.lists(
    st.tuples(st.lists(st.integers(0, 4), max_size=6).map(tuple), st.none() | labels),
    min_size=1,
    max_size=5,
).map(tuple)


def queue_of(items: list[Item], cancelled: set[int] | None = None) -> WaitingQueue[Item]:
    queue: WaitingQueue[Item] = WaitingQueue(
        rank=lambda item: (item[0],),
        tokens=lambda item: item[1],
        group=lambda item: item[2],
        cancelled=lambda item: item[0] in (cancelled or set()),
    )
    for item in items:
        queue.push(item)
    return queue


def drain(queue: WaitingQueue[Item], budget: int) -> list[list[Item]]:
    batches = []
    while batch := queue.take(budget):
        batches.append(batch)
    assert not queue
    return batches


@given(items=items, budget=st.integers(1, 120))
def test_items_are_taken_once_within_budget_and_group(items: list[Item], budget: int) -> None:
    batches = drain(queue_of(items), budget)
    assert sorted(chain.from_iterable(batches)) == items
    for batch in batches:
        assert len({group for _, _, group in batch}) == 1
        assert len(batch) == 1 or sum(tokens for _, tokens, _ in batch) <= budget


@given(items=items, budget=st.integers(1, 120))
def test_the_first_item_is_in_the_next_batch(items: list[Item], budget: int) -> None:
    waiting = set(items)
    for batch in drain(queue_of(items), budget):
        assert min(waiting) == batch[0]
        assert batch == sorted(batch)
        waiting -= set(batch)


@given(items=items, cancelled=st.sets(st.integers(0, 60)))
def test_cancelled_items_are_never_taken(items: list[Item], cancelled: set[int]) -> None:
    batches = drain(queue_of(items, cancelled), 40)
    assert sorted(chain.from_iterable(batches)) == [
        item for item in items if item[0] not in cancelled
    ]


@given(items=items, budget=st.integers(1, 120))
def test_items_put_back_keep_their_place(items: list[Item], budget: int) -> None:
    queue = queue_of(items)
    first = queue.take(budget)
    for item in first:
        queue.push(item)
    assert drain(queue, budget) == drain(queue_of(items), budget)


@given(branches=branches)
def test_each_path_of_the_tree_spells_its_label(branches: tuple[Branch, ...]) -> None:
    tree = label_tree(branches)
    for (suffix, labels), paths, end in zip(branches, tree.paths, tree.ends, strict=True):
        assert spelled(tree, tree.reads[end]) == suffix
        for label, path in zip(labels or (), paths, strict=True):
            assert tuple(tree.children[read][child] for read, child in path) == label
            for depth, (read, _) in enumerate(path):
                assert spelled(tree, tree.reads[read]) == suffix + label[:depth]


def spelled(tree: LabelTree, row: int) -> tuple[int, ...]:
    above = [node for node in range(row) if tree.closes[node] >= row]
    return tuple(tree.tokens[node] for node in above)


@given(branches=branches)
def test_the_tree_has_each_shared_beginning_once(branches: tuple[Branch, ...]) -> None:
    tree = label_tree(branches)
    beginnings = set()
    for suffix, labels in branches:
        for answer in [suffix + label[:-1] for label in labels or ((0,),)]:
            beginnings |= {answer[:end] for end in range(1, len(answer) + 1)}
    assert len(tree) == len(beginnings)
    assert {spelled(tree, row) for row in range(1, len(tree) + 1)} == beginnings
    rows = range(1, len(tree) + 1)
    assert list(tree.depths) == [len(spelled(tree, row)) for row in rows]


@given(branches=branches)
def test_the_tree_does_not_depend_on_the_order(branches: tuple[Branch, ...]) -> None:
    one, other = label_tree(branches), label_tree(branches[::-1])
    assert (one.tokens, one.closes, one.reads) == (other.tokens, other.closes, other.reads)
    assert one.children == other.children
    assert one.paths == other.paths[::-1]
    assert one.ends == other.ends[::-1]


def test_labels_of_one_token_need_no_node() -> None:
    assert len(label_tree((((), ((5,), (6,), (7,))),))) == 0


@given(prompt=st.lists(st.integers(0, 9), min_size=1, max_size=40), shared=st.integers(0, 60))
def test_a_shared_prefix_leaves_a_token_and_is_not_short(prompt: list[int], shared: int) -> None:
    for request in (
        ClassifyRequest(0, prompt, shared_tokens=shared),
        GenerateRequest(0, prompt, 1, shared_tokens=shared),
    ):
        prefix = shared_prefix(request)
        assert list(prefix) == prompt[: len(prefix)]
        assert len(prefix) == 0 or MIN_SHARED_TOKENS <= len(prefix) < len(prompt)


def test_limits_are_halved_down_to_one() -> None:
    limits = Limits(batch_tokens=100, slots=8)
    limits.halve_batch(900)
    assert limits.batch_tokens == 50
    limits.halve_batch(7)
    assert limits.batch_tokens == 3
    limits.halve_slots(8)
    assert limits.slots == 4
    for _ in range(9):
        limits.halve_batch(limits.batch_tokens)
        limits.halve_slots(limits.slots)
    assert (limits.batch_tokens, limits.slots) == (1, 1)
