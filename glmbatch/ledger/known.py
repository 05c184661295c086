"""Known answers: an index by row key of answers to reuse. Knows no prompts and no models.

Row keys are stored beside the answers, in published files and in files that killed runs committed.
The index is built in memory from those files alone. Losing it costs the time to read their key
columns.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import UnusableFile
from glmbatch.ledger.rowkeys import KEY_BYTES
from glmbatch.settings.columns import Columns
from glmbatch.store.files import digest_file
from glmbatch.store.parquet import read_columns
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

# Decoded tables in memory: the rows of a new file often come from the same few old ones.
TABLE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """A file with the answers of `step`. `digest` is its SHA-256, or the beginning of it."""

    path: AnyPath
    step: str
    digest: str


@dataclass(frozen=True, slots=True)
class _Segment:
    """A sorted part of the index: the first half of each key [K], its file and row [K, 2]."""

    halves_K: np.ndarray
    places_K2: np.ndarray

    def __len__(self) -> int:
        return len(self.halves_K)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The places (file, row) of those halves in `wanted` that the segment has, [found, 2]."""
        at = np.searchsorted(self.halves_K, wanted)
        inside = at < len(self)
        at, wanted = at[inside], wanted[inside]
        places: np.ndarray = self.places_K2[at[self.halves_K[at] == wanted]]
        return places


def _sorted_segment(halves_K: np.ndarray, places_K2: np.ndarray) -> _Segment:
    order = np.argsort(halves_K, kind="stable")
    return _Segment(halves_K[order], places_K2[order])


@dataclass(frozen=True, slots=True)
class Hold:
    """The keys that one caller answers (`mine`), and the `earlier` holds on its other keys."""

    mine: frozenset[bytes]
    earlier: tuple[Hold, ...]
    ended: threading.Event

    def wait_for_others(self) -> None:
        """Wait until the earlier callers have committed their keys or failed."""
        for other in self.earlier:
            other.ended.wait()


class KnownAnswers:
    """An index by row key of the answers under one step key. Safe to use from several threads.

    `schema` is that of the step's answer columns. Rows on which the model failed are included only
    with `include_failed`.
    """

    def __init__(
        self, files: Sequence[AnswerFile], step: str, schema: pa.Schema, *, include_failed: bool
    ) -> None:
        self._step = step
        self._schema = schema
        self._include_failed = include_failed
        self._lock = threading.Lock()
        self._holders: dict[bytes, Hold] = {}
        self._files: list[AnswerFile] = []
        # Each is at least twice as large as the next, so a row is sorted only log(rows) times.
        self._segments: list[_Segment] = []
        # By file number, the most recently used last; the last one stays whatever its size.
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._table_bytes = 0
        self._proved: set[int] = set()
        for file in files:
            self.add(file)

    @property
    def any_answer(self) -> bool:
        """Whether at least one row of the step was answered, in this run or before."""
        with self._lock:
            return any(map(len, self._segments))

    def add(self, file: AnswerFile, table: pa.Table | None = None) -> None:
        """Add the answers of a file to the index; a file that cannot be read is logged and skipped.

        `table` has the rows of the file, if the caller has just written them.
        """
        try:
            halves, rows = _halves_and_rows(file, table, self._include_failed)
        except UnusableFile as error:
            logger.warning("%s: its answers are not reused", error)
            return
        with self._lock:
            number = len(self._files)
            self._files.append(file)
            segment = _sorted_segment(halves, np.stack((np.full_like(rows, number), rows), axis=1))
            while self._segments and len(self._segments[-1]) < 2 * len(segment):
                last = self._segments.pop()
                segment = _sorted_segment(
                    np.concatenate((last.halves_K, segment.halves_K)),
                    np.concatenate((last.places_K2, segment.places_K2)),
                )
            self._segments.append(segment)
            if table is not None:
                self._keep_table(number, self._as_own(file, table))

    @contextmanager
    def hold(self, keys: Collection[bytes]) -> Iterator[Hold]:
        """Hold those of `keys` that no other caller holds, until the block ends.

        A caller takes all its keys at once and waits only for callers before it, so there is no
        deadlock.
        """
        with self._lock:
            mine = frozenset(keys) - self._holders.keys()
            earlier: dict[int, Hold] = {}
            for key in self._holders.keys() & set(keys):
                holder = self._holders[key]
                earlier[id(holder)] = holder
            hold = Hold(mine, tuple(earlier.values()), threading.Event())
            self._holders.update(dict.fromkeys(mine, hold))
        try:
            yield hold
        finally:
            with self._lock:
                for key in mine:
                    del self._holders[key]
            hold.ended.set()

    def find(self, keys: Collection[bytes]) -> pa.Table:
        """The known answers under `keys` as a table with `schema`: each once, in any order.

        Skips a file that changed since its commit, with a warning in the log.
        """
        with self._lock:
            segments = list(self._segments)
        missing = set(keys)
        parts = [self._schema.empty_table()]
        # The first segment is the largest. A key that it has is not looked up in the others, so
        # that a text which many files hold is read from one of them.
        for segment in segments:
            if not missing:
                break
            wanted = np.unique(np.frombuffer(b"".join(missing), np.uint64)[::2])
            parts += self._take(segment.find(wanted), missing)
        return pa.concat_tables(parts).combine_chunks()

    def _take(self, places: np.ndarray, missing: set[bytes]) -> Iterator[pa.Table]:
        """The rows at `places` (file, row) whose keys are in `missing`, which they leave."""
        wanted: dict[int, list[int]] = {}
        for file, row in places.tolist():
            wanted.setdefault(file, []).append(row)
        for file, rows in sorted(wanted.items()):
            table = self._table(file)
            if table is None:
                continue
            part = table.take(pa.array(rows, pa.int64()))
            # The index has half of each key, which two keys may share, and a file a key twice.
            is_wanted = []
            for key in part.column(Columns(self._step).key).to_pylist():
                is_wanted.append(key in missing)
                missing.discard(key)
            yield part.filter(pa.array(is_wanted, pa.bool_()))

    def _table(self, number: int) -> pa.Table | None:
        """The answers of a file, from memory or read; None if it changed since its commit."""
        with self._lock:
            table = self._tables.get(number)
            if table is not None:
                self._tables.move_to_end(number)
                return table
        table = self._read(number)
        if table is not None:
            with self._lock:
                self._keep_table(number, table)
        return table

    def _keep_table(self, number: int, table: pa.Table) -> None:
        replaced = self._tables.pop(number, None)
        self._tables[number] = table
        self._table_bytes += table.nbytes - (0 if replaced is None else replaced.nbytes)
        while self._table_bytes > TABLE_BYTES and len(self._tables) > 1:
            self._table_bytes -= self._tables.popitem(last=False)[1].nbytes

    def _read(self, number: int) -> pa.Table | None:
        """The answers of a file; None if it changed since its commit."""
        file = self._files[number]
        try:
            if number not in self._proved and not digest_file(file.path).startswith(file.digest):
                raise UnusableFile(f"{file.path}: was changed after it was committed")
            self._proved.add(number)
            return self._as_own(file, read_columns(file.path, self._names_in(file)))
        except (UnusableFile, OSError, pa.ArrowException) as error:
            logger.warning("%s: its answers are not reused", error)
            return None

    def _names_in(self, file: AnswerFile) -> list[str]:
        """The answer columns as `file` calls them."""
        return [file.step + field.name.removeprefix(self._step) for field in self._schema]

    def _as_own(self, file: AnswerFile, table: pa.Table) -> pa.Table:
        """The answers in `table`, which has the columns of `file`, with this step's schema."""
        own = table.select(self._names_in(file)).rename_columns(self._schema.names)
        return own.cast(self._schema)


def _halves_and_rows(
    file: AnswerFile, table: pa.Table | None, include_failed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The first 8 bytes of each row key in `file` as numbers [K], and the row of each [K]."""
    names = [Columns(file.step).key, Columns(file.step).error]
    columns = read_columns(file.path, names) if table is None else table.select(names)
    try:
        # Cast to a fixed width, because a Delta table stores keys with a variable one.
        keys = columns.column(0).cast(pa.binary(KEY_BYTES)).combine_chunks()
    except pa.ArrowException as error:
        raise UnusableFile(f"{file.path}: its row keys are invalid: {error}") from error
    usable = keys.is_valid()
    if not include_failed:
        usable = pc.and_(usable, columns.column(1).combine_chunks().is_null())
    rows = np.flatnonzero(usable.to_numpy(zero_copy_only=False)).astype(np.int64)
    # Joined to a new buffer, because the array's own may begin before its first value.
    return np.frombuffer(b"".join(keys.filter(usable).to_pylist()), np.uint64)[::2].copy(), rows
