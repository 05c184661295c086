"""Known answers: an index by row key of answers to reuse. Knows no prompts and no models.

Row keys are stored beside the answers, in published files and in files that killed runs committed.
The index is built from those files alone: from segments on disk for published ones (stored.py), in
memory for the others. Losing it costs the time to read their key columns.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from glmbatch.errors import UnusableFile
from glmbatch.ledger.known.keys import AnswerFile, Keys, read_keys
from glmbatch.ledger.known.segments import Entries, Segment, files_of, in_order, places_of, rows_of
from glmbatch.ledger.known.stored import GONE, StoredSegment, covered_as
from glmbatch.settings.columns import Columns
from glmbatch.store.files import digest_file
from glmbatch.store.parquet import read_columns

logger = logging.getLogger(__name__)

# Decoded tables in memory: the rows of a new file often come from the same few old ones.
TABLE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Mapped:
    """A segment on disk, and the number in the index of each file that it covers, or GONE."""

    segment: StoredSegment
    numbers: np.ndarray
    include_failed: bool

    def find(self, wanted: np.ndarray) -> np.ndarray:
        return self.segment.find(wanted, self.numbers, failed=self.include_failed)

    def has_answer(self) -> bool:
        return self.segment.has_answer(self.numbers)


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
    with `include_failed`. `stored` are segments over published files, the largest first; only
    `files` that they do not cover are read. `find_spare` gives the file to use if a published one
    was changed or deleted.
    """

    def __init__(  # noqa: PLR0913 - the files, the rows that count, and where to look instead
        self,
        files: Sequence[AnswerFile],
        step: str,
        schema: pa.Schema,
        *,
        include_failed: bool,
        stored: Sequence[StoredSegment] = (),
        find_spare: Callable[[AnswerFile], AnswerFile | None] = lambda _: None,
    ) -> None:
        self._step = step
        self._schema = schema
        self._include_failed = include_failed
        self._lock = threading.Lock()
        self._holders: dict[bytes, Hold] = {}
        self._files: list[AnswerFile] = []
        self._stored: list[_Mapped] = []
        # Each is at least twice as large as the next, so a row is sorted only log(rows) times.
        self._segments: list[Segment] = []
        # By file number, the most recently used last; the last one stays whatever its size.
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._table_bytes = 0
        self._proved: set[int] = set()
        self._lost: set[int] = set()
        self._find_spare = find_spare
        self._spared: set[str] = set()
        self._sparing = threading.Lock()
        for file in self._map(files, stored):
            self.add(file)

    @property
    def any_answer(self) -> bool:
        """Whether at least one row of the step was answered, in this run or before.

        With `include_failed`, rows in files that no segment on disk covers count as answered.
        """
        if self._any_in_memory():
            return True
        for segment in list(self._stored):
            try:
                if segment.has_answer():
                    return True
            except (UnusableFile, OSError) as error:
                self._replace(segment, error)
        return self._any_in_memory()

    def _any_in_memory(self) -> bool:
        with self._lock:
            return any(map(len, self._segments))

    def _map(
        self, files: Sequence[AnswerFile], stored: Sequence[StoredSegment]
    ) -> list[AnswerFile]:
        """Take the segments that cover some of `files`; return the files that none covers."""
        numbers: dict[bytes, int] = {}
        others = []
        for file in files:
            if not stored or not file.is_published:
                others.append(file)
            elif (digest := covered_as(file.digest)) not in numbers:
                numbers[digest] = len(self._files)
                self._files.append(file)
        missing = set(numbers)
        for segment in stored:
            if missing.isdisjoint(segment.covered):
                continue  # a killed run left it beside the one that it was merged into
            missing.difference_update(segment.covered)
            mapped = np.array([numbers.get(digest, GONE) for digest in segment.covered], np.int64)
            self._stored.append(_Mapped(segment, mapped, self._include_failed))
        return [*others, *(self._files[numbers[digest]] for digest in sorted(missing))]

    def add(self, file: AnswerFile) -> None:
        """Add the answers of a file to the index; one that cannot be read is logged and skipped."""
        try:
            keys = read_keys(file)
        except UnusableFile as error:
            logger.warning("%s: its answers are not read from it", error)
            self._add_spare(file)
            return
        if not self._include_failed:
            keys = Keys(*(column[~keys.failed_K] for column in keys))
        with self._lock:
            number = len(self._files)
            self._files.append(file)
            parts = [Entries(keys.halves_K, places_of(number, keys.rows_K))]
            size = len(keys.halves_K)
            while self._segments and len(self._segments[-1]) < 2 * size:
                last = self._segments.pop()
                parts.insert(0, last.part(0, len(last)))
                size += len(last)
            self._segments.append(Segment(in_order(parts)))

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
        missing = set(keys)
        parts = [self._schema.empty_table()]
        spared: set[int] = set()
        while True:
            lost: set[int] = set()
            with self._lock:
                segments: list[_Mapped | Segment] = [*self._stored, *self._segments]
            try:
                for segment in segments:
                    parts += self._find_in(segment, missing, lost)
            except (UnusableFile, OSError) as error:
                self._replace(segment, error)
                continue
            if lost <= spared:
                return pa.concat_tables(parts).combine_chunks()
            for number in sorted(lost - spared):
                self._add_spare(self._files[number])
            spared |= lost

    def _add_spare(self, file: AnswerFile) -> None:
        """Add the committed file with the answers of a published one that was lost, if any."""
        if not file.spare_key:
            return
        with self._sparing:  # another thread may have lost the same file, or one of its bundle
            if file.spare_key not in self._spared:
                self._spared.add(file.spare_key)
                spare = self._find_spare(file)
                if spare is not None:
                    self.add(spare)

    def _find_in(
        self, segment: _Mapped | Segment, missing: set[bytes], lost: set[int]
    ) -> Iterator[pa.Table]:
        """The rows of `segment` whose keys are in `missing`, which they leave.

        Adds to `lost` the numbers of files that cannot be read.
        """
        # The first segment is the largest. A key that it has is not looked up in the others, so
        # that a text which many files hold is read from one of them.
        if missing:
            wanted = np.unique(np.frombuffer(b"".join(missing), np.uint64)[::2])
            yield from self._take(segment.find(wanted), missing, lost)

    def _replace(self, segment: _Mapped | Segment, error: Exception) -> None:
        """Read the keys of the files that a damaged segment covers from the files."""
        if not isinstance(segment, _Mapped):
            raise error
        logger.warning("%s: is left out, and its keys are read again", error)
        with self._lock:
            if segment not in self._stored:  # another thread has found it too
                return
            self._stored.remove(segment)
        segment.segment.discard()
        for number in segment.numbers[segment.numbers != GONE].tolist():
            self.add(self._files[number])

    def _take(self, places: np.ndarray, missing: set[bytes], lost: set[int]) -> Iterator[pa.Table]:
        """The rows at `places` (file, row) whose keys are in `missing`, as `_find_in`."""
        wanted: dict[int, list[int]] = {}
        for file, row in zip(files_of(places).tolist(), rows_of(places).tolist(), strict=True):
            wanted.setdefault(file, []).append(row)
        for file, rows in sorted(wanted.items()):
            table = self._table(file)
            if table is None:
                lost.add(file)
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
            if table is not None or number in self._lost:
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
            logger.warning("%s: its answers are not read from it", error)
            self._lost.add(number)
            return None

    def _names_in(self, file: AnswerFile) -> list[str]:
        """The answer columns as `file` calls them."""
        return [file.step + field.name.removeprefix(self._step) for field in self._schema]

    def _as_own(self, file: AnswerFile, table: pa.Table) -> pa.Table:
        """The answers in `table`, which has the columns of `file`, with this step's schema."""
        own = table.select(self._names_in(file)).rename_columns(self._schema.names)
        return own.cast(self._schema)
