"""Answers that need not be asked for again, by row key. Knows no prompts and no models.

Keys lie beside the answers, in published files and in files that killed runs committed. The index
over them is in memory and is made from those files alone: losing it costs the time to read their
key columns.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

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

# Tables of answers kept decoded: rows of one new file often come from the same old ones.
TABLES_KEPT = 8


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """A file with the answers of `step`. `digest` begins the SHA-256 of its bytes."""

    path: AnyPath
    step: str
    digest: str


@dataclass(frozen=True, slots=True)
class _Segment:
    """Where keys lie: their first halves, sorted, each with its file's number and its row."""

    halves_K: np.ndarray
    places_K2: np.ndarray

    def __len__(self) -> int:
        return len(self.halves_K)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The places [found, 2] of those halves `wanted` that are here."""
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
    """Keys that one caller answers (`mine`), and the `earlier` callers that answer the others."""

    mine: frozenset[bytes]
    earlier: tuple[Hold, ...]
    ended: threading.Event

    def wait_for_others(self) -> None:
        """Return once the earlier callers have committed their keys, or failed to."""
        for other in self.earlier:
            other.ended.wait()


class KnownAnswers:
    """The answers under one step key, by row key. Safe to use from several threads.

    `schema` is that of the step's answer columns. Rows on which the model failed are among the
    answers only with `include_failed`.
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
        # Each at least twice as large as the next: a row is sorted again only log(rows) times.
        self._segments: list[_Segment] = []
        self._proved: set[int] = set()
        self._table = lru_cache(TABLES_KEPT)(self._read)
        for file in files:
            self.add(file)

    @property
    def any_answer(self) -> bool:
        """Whether a single row of the step was answered, in this run or before."""
        with self._lock:
            return any(map(len, self._segments))

    def add(self, file: AnswerFile, table: pa.Table | None = None) -> None:
        """Index the answers of one more file; one that cannot be read has none.

        `table` holds its rows where the caller has just written them.
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

    @contextmanager
    def hold(self, keys: Collection[bytes]) -> Iterator[Hold]:
        """Hold those of `keys` that no other caller holds, until the end of the block.

        All keys are taken at once, and a caller waits only for those that came before it, so
        callers never wait for one another in a circle.
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
        """The answers under `keys` that are known, each once, in any order."""
        wanted: dict[int, list[int]] = {}
        for file, row in self._look_up(list(keys)):
            wanted.setdefault(file, []).append(row)
        parts = [self._schema.empty_table()]
        for file, rows in sorted(wanted.items()):
            table = self._table(file)
            if table is not None:
                parts.append(table.take(pa.array(rows, pa.int64())))
        answers = pa.concat_tables(parts).combine_chunks()
        # The index holds half of each key, which may be another's, and a key may lie in two files.
        missing = set(keys)
        wanted_rows = []
        for key in answers.column(Columns(self._step).key).to_pylist():
            wanted_rows.append(key in missing)
            missing.discard(key)
        return answers.filter(pa.array(wanted_rows, pa.bool_()))

    def _look_up(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        if not keys:
            return []
        wanted = np.unique(np.frombuffer(b"".join(keys), np.uint64)[::2])
        with self._lock:
            segments = list(self._segments)
        places: list[tuple[int, int]] = []
        for segment in segments:
            for file, row in segment.find(wanted):
                places.append((int(file), int(row)))
        return places

    def _read(self, number: int) -> pa.Table | None:
        """The answers of a file; None when it is no longer what was committed."""
        file = self._files[number]
        try:
            if number not in self._proved and not digest_file(file.path).startswith(file.digest):
                raise UnusableFile(f"{file.path}: was changed after it was written")
            self._proved.add(number)
            names = [file.step + field.name.removeprefix(self._step) for field in self._schema]
            table = read_columns(file.path, names).rename_columns(self._schema.names)
            return table.cast(self._schema)
        except (UnusableFile, OSError, pa.ArrowException) as error:
            logger.warning("%s: its answers are not reused", error)
            return None


def _halves_and_rows(
    file: AnswerFile, table: pa.Table | None, include_failed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The first 8 bytes of the row keys of `file`, and the rows in which they are."""
    names = [Columns(file.step).key, Columns(file.step).error]
    columns = read_columns(file.path, names) if table is None else table.select(names)
    try:
        # Fixed width again: in a Delta table they have none.
        keys = columns.column(0).cast(pa.binary(KEY_BYTES)).combine_chunks()
    except pa.ArrowException as error:
        raise UnusableFile(f"{file.path}: its keys are no keys: {error}") from error
    usable = keys.is_valid()
    if not include_failed:
        usable = pc.and_(usable, columns.column(1).combine_chunks().is_null())
    rows = np.flatnonzero(usable.to_numpy(zero_copy_only=False)).astype(np.int64)
    # Through a copy, whose buffer begins with its first value.
    return np.frombuffer(b"".join(keys.filter(usable).to_pylist()), np.uint64)[::2].copy(), rows
