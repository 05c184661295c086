"""Fragments are submitted in a sliding window."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from tasks.window import in_window


def window(
    submit: Callable[[int, str], Future[int]], seats: list[str], items: int = 6
) -> list[list[Any]]:
    def submit_one(item: int, seat: str) -> list[Any]:
        return [submit(item, seat)]

    return in_window(range(items), submit_one, seats, lambda *_: None)


def test_a_slow_item_occupies_only_its_own_seat() -> None:
    slow: Future[int] = Future()
    given: list[tuple[int, str]] = []

    def submit(item: int, seat: str) -> Future[int]:
        given.append((item, seat))
        if item == 0:
            return slow
        if item == 5:
            threading.Timer(0.1, slow.set_result, [0]).start()
        done: Future[int] = Future()
        done.set_result(item)
        return done

    assert window(submit, ["first", "second"]) == [[number] for number in range(6)]
    assert given == [(0, "first"), *((item, "second") for item in range(1, 6))]


def test_the_first_failure_is_raised_at_once() -> None:
    def submit(item: int, seat: str) -> Future[int]:
        future: Future[int] = Future()
        if item == 1:
            future.set_exception(ValueError("item 1"))
        return future  # others never end

    with pytest.raises(ValueError, match="item 1"):
        window(submit, ["first", "second"])
