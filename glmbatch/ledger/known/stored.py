"""The index of known answers on disk: sorted segments over published files. Reads no answers.

    OUTPUT/_glmbatch/keys/<step key>.<digest>.keys

A segment has blocks of BLOCK_ROWS entries, each its halves and then its places (see segments.py),
and behind them a **head**: the first half and the digest of each block, and the digests of the
files that the segment covers. A place numbers a file by that list.

The name contains the digest of the head, and a block is compared with its digest when it is first
read. So a segment is opened without reading it whole, and damage cannot hide an answer. Everything
here is derived: without it, a run reads the key columns of the published files again.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import BinaryIO
from weakref import finalize

import numpy as np

from glmbatch.errors import GlmbatchError, UnusableFile
from glmbatch.ledger.known.segments import (
    Entries,
    files_of,
    places_of,
    rows_of,
)
from glmbatch.ledger.receipts import digest_in_name
from glmbatch.store.files import DIGEST_CHARS, commit, partial_beside
from glmbatch.store.paths import AnyPath
from glmbatch.store.snapshot import open_copy

logger = logging.getLogger(__name__)

KEYS = "_glmbatch/keys"
SUFFIX = ".keys"
NUMBER = np.dtype("<u8")
BLOCK_ROWS = 1024  # 16 KB
BLOCK_BYTES = 2 * BLOCK_ROWS * NUMBER.itemsize
FILE_BYTES = DIGEST_CHARS // 2
# The end of a segment: a mark of the format, and how many entries and files it has.
TAIL = struct.Struct("<8sQQ")
MARK = b"GLMKEYS1"
FAILED = np.uint64(1 << 31)  # in the place of a row on which the model failed
GONE = -1  # the number of a file that is not published any more


class StoredSegment:
    """A segment on disk. `covered` has the beginning of the digest of each of its files, as bytes.

    Only its head is in memory. Blocks are read when needed, not mapped: a mapped page that cannot
    be read ends the process, and in a cluster another process may delete the segment. From a store
    it is fetched whole, which costs less than a request for each block.
    """

    def __init__(self, path: AnyPath, *, is_mine: bool = False) -> None:
        """Open the segment. UnusableFile when its head is not what was written.

        With `is_mine` this process may delete it.
        """
        self.path = path
        self._is_mine = is_mine
        self._file = open_copy(path)
        finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, TAIL.size, max(0, size - TAIL.size))
        mark, self._length, files = TAIL.unpack(tail) if len(tail) == TAIL.size else (b"", 0, 0)
        blocks = -(-self._length // BLOCK_ROWS)
        head_bytes = 2 * blocks * NUMBER.itemsize + files * FILE_BYTES + TAIL.size
        if mark != MARK or size != blocks * BLOCK_BYTES + head_bytes:
            raise UnusableFile(f"{path}: is not a segment of known keys")
        head = os.pread(self._file, head_bytes, blocks * BLOCK_BYTES)
        if not _hex_of(head).startswith(digest_in_name(path)):
            raise UnusableFile(f"{path}: is damaged")
        self._firsts = np.frombuffer(head, NUMBER, blocks)
        self._digests = np.frombuffer(head, NUMBER, blocks, blocks * NUMBER.itemsize)
        self._proven = np.zeros(blocks, bool)
        at = 2 * blocks * NUMBER.itemsize
        starts = range(at, at + files * FILE_BYTES, FILE_BYTES)
        self.covered = [head[start : start + FILE_BYTES] for start in starts]

    def __len__(self) -> int:
        return int(self._length)

    def discard(self) -> None:
        """Delete the file if that is for this process to do; what is open stays readable."""
        if self._is_mine:
            with suppress(OSError, GlmbatchError):  # another run deletes it
                self.path.unlink()

    def part(self, first: int, end: int) -> Entries:
        start, end = first // BLOCK_ROWS, min(end, self._length)
        blocks = self._read(start, -(-end // BLOCK_ROWS))
        rows = slice(first - start * BLOCK_ROWS, end - start * BLOCK_ROWS)
        return Entries(blocks[:, 0].reshape(-1)[rows], blocks[:, 1].reshape(-1)[rows])

    def find(self, wanted: np.ndarray, numbers: np.ndarray, *, failed: bool) -> np.ndarray:
        """For each of the sorted halves `wanted` that it has, the first place whose file counts.

        `numbers` gives each covered file its number in the places, or GONE. Rows on which the model
        failed count only with `failed`. UnusableFile when a block is damaged.
        """
        # The block whose first half is the last one below the wanted half.
        blocks = np.maximum(np.searchsorted(self._firsts, wanted) - 1, 0)
        found = [np.empty(0, np.uint64)]
        for part in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(blocks)) + 1):
            if len(part) and self._length:
                found.append(self._find_in(int(blocks[part[0]]), wanted[part], numbers, failed))
        places = np.concatenate(found)
        return places_of(numbers[files_of(places)], rows_of(places & ~FAILED))

    def has_answer(self, numbers: np.ndarray) -> bool:
        """Whether any row did not fail in the files that `numbers` does not give as GONE.

        Reads blocks up to the first such row. UnusableFile when one of them is damaged.
        """
        for number in range(len(self._firsts)):
            if _counts(self._block(number).places_K, numbers, failed=False).any():
                return True
        return False

    def _find_in(
        self, block: int, wanted: np.ndarray, numbers: np.ndarray, failed: bool
    ) -> np.ndarray:
        halves, places = self._block(block)
        at = np.searchsorted(halves, wanted)
        inside = at < len(halves)
        at, asked = at[inside], wanted[inside]
        is_equal = halves[at] == asked
        first = places[at[is_equal]]
        counts = _counts(first, numbers, failed)
        # A later entry with the same half counts, or the next block begins with it.
        rest = np.concatenate((asked[is_equal][~counts], wanted[~inside]))
        later = [self._search(block, half, numbers, failed) for half in rest]
        return np.concatenate((first[counts], *later))

    def _search(self, block: int, half: np.uint64, numbers: np.ndarray, failed: bool) -> np.ndarray:
        """The first place of `half` that counts, from `block` on; an array of one or none."""
        while block < len(self._firsts) and self._firsts[block] <= half:
            halves, places = self._block(block)
            start, end = np.searchsorted(halves, half), np.searchsorted(halves, half, "right")
            places = places[start:end]
            first: np.ndarray = places[_counts(places, numbers, failed)][:1]
            if len(first):
                return first
            block += 1
        return np.empty(0, np.uint64)

    def _block(self, number: int) -> Entries:
        block = self._read(number, number + 1)[0]
        length = min(BLOCK_ROWS, self._length - number * BLOCK_ROWS)
        return Entries(block[0, :length], block[1, :length])

    def _read(self, start: int, end: int) -> np.ndarray:
        """The blocks from `start` to before `end`, as halves and places [blocks, 2, BLOCK_ROWS]."""
        size = (end - start) * BLOCK_BYTES
        content = os.pread(self._file, size, start * BLOCK_BYTES)
        if len(content) != size:
            raise UnusableFile(f"{self.path}: is damaged")
        blocks = np.frombuffer(content, NUMBER).reshape(-1, 2, BLOCK_ROWS)
        for number in np.flatnonzero(~self._proven[start:end]):
            if _digest_of(blocks[number]) != self._digests[start + number]:
                raise UnusableFile(f"{self.path}: is damaged")
            self._proven[start + number] = True
        return blocks


def _counts(places: np.ndarray, numbers: np.ndarray, failed: bool) -> np.ndarray:
    counts: np.ndarray = numbers[files_of(places)] != GONE
    return counts if failed else counts & (places & FAILED == 0)


def covered_as(digest: str) -> bytes:
    """How a segment lists a file with this SHA-256."""
    return bytes.fromhex(digest[:DIGEST_CHARS])


def write_segment(
    folder: AnyPath, step_key: str, parts: Iterator[Entries], covered: Sequence[bytes]
) -> AnyPath:
    """Write the entries of `parts`, which are in order, to a segment; return its path.

    `covered` are the files by the numbers in the places. Leaves out entries of files that are GONE.
    """
    with partial_beside(folder / step_key) as partial:
        with partial.open("wb") as file:
            head = _write_blocks(file, parts, covered)
        path = folder / f"{step_key}.{_hex_of(head)[:DIGEST_CHARS]}{SUFFIX}"
        commit(partial, path)
    return path


def _write_blocks(file: BinaryIO, parts: Iterator[Entries], covered: Sequence[bytes]) -> bytes:
    """Write a segment with the entries of `parts`; return its head."""
    firsts = []
    digests = []
    length = 0
    for halves, places in _blocks(_present(parts)):
        block = np.zeros((2, BLOCK_ROWS), NUMBER)
        block[0, : len(halves)] = halves
        block[1, : len(places)] = places
        file.write(block.tobytes())
        firsts.append(halves[0])
        digests.append(_digest_of(block))
        length += len(halves)
    head = [np.array(firsts, NUMBER).tobytes(), np.array(digests, NUMBER).tobytes()]
    head += [*covered, TAIL.pack(MARK, length, len(covered))]
    file.write(b"".join(head))
    return b"".join(head)


def _present(parts: Iterator[Entries]) -> Iterator[Entries]:
    """The entries whose file is not GONE."""
    gone = int(files_of(places_of(GONE, np.zeros(1, np.uint64)))[0])
    for part in parts:
        stays = files_of(part.places_K) != gone
        yield Entries(part.halves_K[stays], part.places_K[stays])


def _blocks(parts: Iterator[Entries]) -> Iterator[Entries]:
    """The same entries in parts of BLOCK_ROWS; only the last may have fewer."""
    halves = places = np.empty(0, np.uint64)
    for part in parts:
        halves = np.concatenate((halves, part.halves_K))
        places = np.concatenate((places, part.places_K))
        whole = len(halves) // BLOCK_ROWS * BLOCK_ROWS
        for start in range(0, whole, BLOCK_ROWS):
            end = start + BLOCK_ROWS
            yield Entries(halves[start:end], places[start:end])
        halves, places = halves[whole:], places[whole:]
    if len(halves):
        yield Entries(halves, places)


def _hex_of(head: bytes) -> str:
    return sha256(head).hexdigest()


def _digest_of(block: np.ndarray) -> int:
    return int.from_bytes(sha256(block.tobytes()).digest()[: NUMBER.itemsize], "little")
