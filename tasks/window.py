"""Submits fragments in a sliding window: one per seat, the next as soon as one ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from prefect.futures import PrefectFuture

Item = TypeVar("Item")
Seat = TypeVar("Seat")


def in_window(
    items: Iterable[Item],
    submit: Callable[[Item, Seat], Sequence[PrefectFuture[Any]]],
    seats: Iterable[Seat],
    ended: Callable[[Item, Seat, list[Any]], None],
) -> list[list[Any]]:
    """Submit the tasks of each item as soon as a seat is free; the results of each item, in order.

    An item keeps its seat until its last task ends. Calls `ended` for each item when it ends.
    Raises the error of the first failed task at once, without waiting for the others.
    """
    results: dict[int, list[Any]] = {}
    free = deque(seats)
    in_flight: dict[int, tuple[Item, Seat, Sequence[PrefectFuture[Any]]]] = {}
    # The tasks' threads fill it; the flow's thread reads it.
    finished: SimpleQueue[int] = SimpleQueue()

    def finish(number: int) -> Callable[[PrefectFuture[Any]], None]:
        return lambda _: finished.put(number)

    def collect() -> None:
        number = finished.get()
        item, seat, futures = in_flight.pop(number)
        # Raises the error of the first failed task, without waiting for other items.
        results[number] = [future.result() for future in futures]
        free.append(seat)
        ended(item, seat, results[number])

    for number, item in enumerate(items):
        if not free:
            collect()
        seat = free.popleft()
        futures = submit(item, seat)
        in_flight[number] = item, seat, futures
        # The last task waits for the others, so the item ends with it.
        futures[-1].add_done_callback(finish(number))
    while in_flight:
        collect()
    return [results[number] for number in sorted(results)]
