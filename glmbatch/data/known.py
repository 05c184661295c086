"""Answers that need not be asked for again, found by row key wherever they lie. Knows no prompts and no models.

The keys stand beside the answers in the published files and in what killed runs left committed. The index over them is
held in memory and made from those files alone: losing it costs the time to read their key columns.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.data.parquet import open_parquet
from glmbatch.data.rowkeys import KEY_BYTES
from glmbatch.data.storage import digest_file
from glmbatch.errors import UnusableFile

logger = logging.getLogger(__name__)

# Tables of answers kept decoded: rows of one new file often come from the same old ones.
TABLES_KEPT = 8


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """A file with the answers of one step, whose columns begin with `step`; `digest` is that of its bytes."""

    path: Path
    step: str
    digest: str


class KnownAnswers:
    """The answers under one step key, by row key; `schema` is that of the step's columns. Safe to use from threads.

    With `retry_failed`, rows on which the model failed are not among them.
    """

    def __init__(self, files: Sequence[AnswerFile], step: str, schema: pa.Schema, *, retry_failed: bool) -> None:
        self._step, self._schema, self._retry_failed = step, schema, retry_failed
        self._lock = threading.Lock()
        self._released = threading.Condition()
        self._held: set[bytes] = set()
        self._files: list[AnswerFile] = []
        self._unsorted = True
        # The first half of each key, with the file and row where it stands; sorted by it when first asked.
        self._halves: list[np.ndarray] = []
        self._places: list[np.ndarray] = []
        self._table = lru_cache(TABLES_KEPT)(self._read)
        for file in files:
            self.add(file)

    def add(self, file: AnswerFile) -> None:
        """Take in the answers of one more file; one that cannot be read has none."""
        try:
            halves, rows = _halves_and_rows(file, self._retry_failed)
        except UnusableFile as error:
            logger.warning("%s: its answers are not reused", error)
            return
        with self._lock:
            self._halves.append(halves)
            self._places.append(np.stack((np.full_like(rows, len(self._files)), rows), axis=1))
            self._files.append(file)
            self._unsorted = True

    @contextmanager
    def hold(self, keys: Collection[bytes]) -> Iterator[set[bytes]]:
        """Those of `keys` that nobody holds, held until the end: they are being answered, and others wait for them.

        Taken all at once, so that no two callers wait for each other.
        """
        with self._released:
            mine = set(keys) - self._held
            self._held |= mine
        try:
            yield mine
        finally:
            with self._released:
                self._held -= mine
                self._released.notify_all()

    def wait_for(self, keys: Collection[bytes]) -> None:
        """Return once nobody holds any of `keys`."""
        with self._released:
            self._released.wait_for(lambda: self._held.isdisjoint(keys))

    def find(self, keys: Collection[bytes]) -> pa.Table:
        """The answers under `keys` that are known, each once, in any order."""
        wanted: dict[int, list[int]] = {}
        for file, row in self._look_up(list(keys)):
            wanted.setdefault(file, []).append(row)
        found = [self._schema.empty_table()]
        for file, rows in sorted(wanted.items()):
            table = self._table(file)
            if table is not None:
                found.append(table.take(pa.array(rows, pa.int64())))
        answers = pa.concat_tables(found).combine_chunks()
        asked = set(keys)  # half a key may be another's
        sure = [key in asked for key in answers.column(f"{self._step}_key").to_pylist()]
        return answers.filter(pa.array(sure, pa.bool_()))

    def _look_up(self, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        if not keys:
            return []
        halves, places = self._sorted()
        wanted = np.unique(np.frombuffer(b"".join(keys), np.uint64)[::2])
        at = np.searchsorted(halves, wanted)
        at = at[at < len(halves)]
        wanted = wanted[: len(at)]
        return [(int(file), int(row)) for file, row in places[at[halves[at] == wanted]]]

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if self._unsorted:
                halves = np.concatenate([np.empty(0, np.uint64), *self._halves])
                places = np.concatenate([np.empty((0, 2), np.int64), *self._places])
                order = np.argsort(halves, kind="stable")
                self._halves, self._places, self._unsorted = [halves[order]], [places[order]], False
            return self._halves[0], self._places[0]

    def _read(self, number: int) -> pa.Table | None:
        """The answers of a file; None when it is no longer what was committed."""
        file = self._files[number]
        try:
            if not digest_file(file.path).startswith(file.digest):
                raise UnusableFile(f"{file.path}: was changed after it was written")
            with open_parquet(file.path) as opened:
                names = [file.step + field.name.removeprefix(self._step) for field in self._schema]
                table = opened.read(columns=names).select(names).rename_columns(self._schema.names)
                return table.cast(self._schema)
        except (UnusableFile, OSError, pa.ArrowException, KeyError) as error:
            logger.warning("%s: its answers are not reused", error)
            return None


def _halves_and_rows(file: AnswerFile, retry_failed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first 8 bytes of the row keys of `file`, and the rows where they stand."""
    with open_parquet(file.path) as opened:
        columns = opened.read(columns=[f"{file.step}_key", f"{file.step}_error"])
    keys = columns.column(f"{file.step}_key").combine_chunks()
    kept = keys.is_valid()
    if retry_failed:
        kept = pc.and_(kept, columns.column(f"{file.step}_error").combine_chunks().is_null())
    rows = np.flatnonzero(kept.to_numpy(zero_copy_only=False)).astype(np.int64)
    # Through a copy, whose buffer begins with its first value.
    bytes_of_keys = b"".join(keys.filter(kept).to_pylist())
    assert len(bytes_of_keys) == KEY_BYTES * len(rows)
    return np.frombuffer(bytes_of_keys, np.uint64)[::2].copy(), rows
