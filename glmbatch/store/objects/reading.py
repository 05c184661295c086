"""Files over the objects of a store: from start to end, or by ranges of bytes.

All bytes of a file are of one version: a read fails if the object has another one by then. Small
objects stay in memory, because the ledger reads its own several times.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, TypeAlias

from glmbatch.store.errors import NO_SUCH_RANGE, status_of
from glmbatch.store.objects.clients import Client
from glmbatch.store.objects.listing import Facts, facts_of

# Turns the errors of a block into ours.
Where: TypeAlias = Callable[[], AbstractContextManager[None]]
AHEAD_BYTES = 1 << 20  # read from a connection at once
# The cache of small objects: the largest size in bytes, and how many of them.
KEPT_BYTES, KEPT_OBJECTS = 1 << 20, 64
# The end of an object is fetched when it is opened: pyarrow begins with so many bytes for a footer.
TAIL_BYTES = 64 << 10


class ObjectFile(io.RawIOBase):
    """An object as a file for reading, with its `facts`; `_part` gives bytes from a place on."""

    def __init__(self, facts: Facts, where: Where) -> None:
        super().__init__()
        self.facts = facts
        self._where = where
        self._at = 0

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there are bytes, and return their number."""
        wanted = min(len(buffer), self.facts.size - self._at)
        if wanted <= 0:
            return 0
        with self._where():
            part = self._part(wanted)
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _part(self, wanted: int) -> Any:
        raise NotImplementedError


class Stream(ObjectFile):
    """An object from start to end, in one request."""

    def __init__(self, facts: Facts, where: Where, chunks: Iterator[Any]) -> None:
        super().__init__(facts, where)
        self._chunks = chunks
        self._rest = memoryview(b"")

    def _part(self, wanted: int) -> Any:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        part, self._rest = self._rest[:wanted], self._rest[wanted:]
        return part


class Ranges(ObjectFile):
    """An object for random access: each read is one request for exactly its bytes.

    What lies in its last bytes, the `tail`, is there already.
    """

    def __init__(
        self, facts: Facts, where: Where, client: Client, key: str, tail: bytes = b""
    ) -> None:
        super().__init__(facts, where)
        self._client, self._key, self._tail = client, key, tail

    def seekable(self) -> bool:
        """True: it can be read from any place on."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to another place."""
        self._at = offset + {0: 0, 1: self._at, 2: self.facts.size}[whence]
        return self._at

    def _part(self, wanted: int) -> Any:
        within = self._at - (self.facts.size - len(self._tail))
        if within >= 0:
            return self._tail[within : within + wanted]
        return self._client.reading.get(
            self._key,
            options={"range": (self._at, self._at + wanted), "if_match": self.facts.version},
        ).bytes()


class Kept(io.BytesIO):
    """A small object in memory, as a file with its `facts`."""

    def __init__(self, facts: Facts, content: bytes) -> None:
        super().__init__(content)
        self.facts = facts


@lru_cache(KEPT_OBJECTS)
def kept(client: Client, key: str) -> list[tuple[Facts, bytes]]:
    """The last version of a small object that was read, at most one, put here by its reader."""
    return []


def open_stream(client: Client, key: str, where: Where) -> Stream | Kept:
    """The object as a file from start to end; without its bytes if they are in memory."""
    from obstore.exceptions import NotModifiedError

    known = list(kept(client, key))
    try:
        options: Any = {"if_none_match": known[0][0].version} if known else None
        answer = client.reading.get(key, options=options)
    except NotModifiedError:
        return Kept(*known[0])
    facts = facts_of(answer.meta)
    if facts.size > KEPT_BYTES:
        return Stream(facts, where, iter(answer.stream(AHEAD_BYTES)))
    return _keep(client, key, facts, bytes(answer.bytes()))


def open_ranges(client: Client, key: str, where: Where) -> Ranges | Kept:
    """The object as a file for random access; a small one is read whole."""
    from obstore.exceptions import NotModifiedError

    known = list(kept(client, key))
    try:
        facts, tail = _end_of(client, key, known[0][0].version if known else None)
    except NotModifiedError:
        return Kept(*known[0])
    if facts.size > KEPT_BYTES:
        return Ranges(facts, where, client, key, tail)
    if known and known[0][0].version == facts.version:
        return Kept(*known[0])
    if len(tail) < facts.size:
        tail = bytes(client.reading.get(key, options={"if_match": facts.version}).bytes())
    return _keep(client, key, facts, tail)


def _end_of(client: Client, key: str, version: str | None) -> tuple[Facts, bytes]:
    """What the store says of the object, and its last bytes, if that takes no further request.

    Of an object of this `version` it has none, or NotModifiedError is raised.
    """
    from obstore.exceptions import GenericError

    if client.s3 is None:  # Azure has no ranges from the end
        return facts_of(client.reading.head(key)), b""
    options: Any = {"range": {"suffix": TAIL_BYTES}}
    if version is not None:
        options["if_none_match"] = version
    try:
        answer = client.reading.get(key, options=options)
    except GenericError as error:
        # An empty object has no such range, and some stores then send it without a range.
        if status_of(error) not in (NO_SUCH_RANGE, None):
            raise
        return facts_of(client.reading.head(key)), b""
    return facts_of(answer.meta), bytes(answer.bytes())


def _keep(client: Client, key: str, facts: Facts, content: bytes) -> Kept:
    kept(client, key)[:] = [(facts, content)]
    return Kept(facts, content)
