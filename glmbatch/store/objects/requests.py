"""Counts the requests of this process to object stores, by kind, and the bytes of objects.

A request counts when it is sent, whatever its answer. Not counted are those of other libraries that
reach a store by themselves (deltalake), of other processes, and what obstore repeats by itself.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel

MULTIPART = 2  # requests of an upload in parts, beside its parts: its begin and its end


class Requests(BaseModel, frozen=True, extra="forbid"):
    """Numbers of requests by kind, and bytes of objects that were read and written.

    `puts` include the parts of large uploads. Stores sell `writes` and `reads` by the thousand;
    `deletes` are free.
    """

    puts: int = 0
    copies: int = 0
    lists: int = 0
    gets: int = 0
    heads: int = 0
    deletes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def writes(self) -> int:
        """Requests of the dearer kind: S3's PUT, COPY, POST and LIST; class A of Google."""
        return self.puts + self.copies + self.lists

    @property
    def reads(self) -> int:
        """Requests of the cheaper kind: GET and HEAD; class B of Google."""
        return self.gets + self.heads


_COUNTS: Counter[str] = Counter()
_COUNTING = threading.Lock()


def count(**numbers: int) -> None:
    """Add to the counts of this process."""
    with _COUNTING:
        _COUNTS.update(numbers)


def take_requests() -> Requests | None:
    """What was counted since the last call; None if nothing was.

    So each request counts once, in one of the runs of a process.
    """
    with _COUNTING:
        taken = Requests(**_COUNTS) if _COUNTS else None
        _COUNTS.clear()
    return taken


class Counting:
    """A client of obstore that counts its requests."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str, **options: Any) -> Any:
        """Request an object, or a part of it."""
        count(gets=1)
        answer = self.store.get(key, **options)
        first, end = answer.range
        count(bytes_read=end - first)
        return answer

    def head(self, key: str) -> Any:
        """Request what the store says of an object."""
        count(heads=1)
        return self.store.head(key)

    def put(self, key: str, content: Any, **options: Any) -> Any:
        """Write an object, in parts of `chunk_size` bytes if that is given."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        part = options.get("chunk_size")
        puts = 1 if part is None else MULTIPART + math.ceil(size / part)
        count(puts=puts, bytes_written=size)
        return self.store.put(key, content, **options)

    def copy(self, key: str, target: str) -> None:
        """Copy an object inside the store."""
        count(copies=1)
        self.store.copy(key, target)

    def delete(self, key: str) -> None:
        """Delete an object."""
        count(deletes=1)
        self.store.delete(key)


def count_all(client: Any) -> Any:
    """`client` of boto3, which counts its requests from now on, also those that it repeats."""

    def sent(request: Any, event_name: str, **_: Any) -> None:
        count(lists=1) if "List" in event_name else count(heads=1)

    client.meta.events.register("before-send.s3", sent)
    return client
