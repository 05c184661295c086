"""A window over the fragments: as many in flight as seats, the next as soon as one ends."""

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
    """Submit the tasks of each item once a seat is free; it is kept until the last one ends.

    Returns the results of each item in order, and calls `ended` as they come. Raises the first
    failure at once, with the error that the task itself raised.
    """
    results: dict[int, list[Any]] = {}
    free = deque(seats)
    in_flight: dict[int, tuple[Item, Seat, Sequence[PrefectFuture[Any]]]] = {}
    # Filled by the threads of the tasks, read by the flow's.
    finished: SimpleQueue[int] = SimpleQueue()

    def finish(number: int) -> Callable[[PrefectFuture[Any]], None]:
        return lambda _: finished.put(number)

    def collect() -> None:
        number = finished.get()
        item, seat, futures = in_flight.pop(number)
        # Raises what the first failed task raised, without waiting for other items.
        results[number] = [future.result() for future in futures]
        free.append(seat)
        ended(item, seat, results[number])

    for number, item in enumerate(items):
        if not free:
            collect()
        seat = free.popleft()
        futures = submit(item, seat)
        in_flight[number] = item, seat, futures
        # The last one waits for the others, so its end is the item's.
        futures[-1].add_done_callback(finish(number))
    while in_flight:
        collect()
    return [results[number] for number in sorted(results)]
