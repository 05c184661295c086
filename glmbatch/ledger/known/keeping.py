"""Keep the index of known answers on disk: which segments there are, and which files they cover.

A segment is written when a run has published its files, or when a run first needs the index and
files are missing from it. Segments are merged so that their number grows as a logarithm of their
entries, and those of which most files are no longer published are written again without them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import chain, compress

import numpy as np

from glmbatch.errors import GlmbatchError, UnusableFile
from glmbatch.ledger.known.keys import AnswerFile, Keys, read_keys
from glmbatch.ledger.known.segments import (
    Entries,
    Segment,
    Sorted,
    files_of,
    in_order,
    merged,
    places_of,
    rows_of,
)
from glmbatch.ledger.known.stored import (
    FAILED,
    GONE,
    SUFFIX,
    StoredSegment,
    covered_as,
    write_segment,
)
from glmbatch.ledger.receipts import key_in_name
from glmbatch.store.paths import AnyPath

logger = logging.getLogger(__name__)

NOTED_ROWS = 1 << 20  # kept in memory until they are written: 13 MB
LOOKS = 3  # at the folder, while another run merges segments


class StoredKeys:
    """The segments in `folder`, by step key. Safe to use from several threads.

    Only the holder of the output's lock writes them, which it says with `is_writer`.
    """

    def __init__(self, folder: AnyPath) -> None:
        self.is_writer = False
        self._folder = folder
        self._noted: dict[str, list[tuple[str, Keys]]] = {}
        self._noted_rows = 0
        self._lock = threading.RLock()  # a merge opens segments while it has the lock
        self._opened: dict[tuple[AnyPath, bool], StoredSegment] = {}

    def open(self, step_key: str) -> list[StoredSegment]:
        """The sound segments of a step key, the largest first; others are logged and skipped."""
        with self._lock:
            return sorted(self._open_all(step_key, LOOKS), key=len, reverse=True)

    def _open_all(self, step_key: str, looks: int) -> list[StoredSegment]:
        segments = []
        paths = self._paths(f"{step_key}.*{SUFFIX}")
        for opened in list(self._opened):
            if key_in_name(opened[0]) == step_key and opened[0] not in paths:
                self._opened.pop(opened, None)
        for path in paths:
            try:
                segments.append(self._open(path))
            except (GlmbatchError, OSError) as error:
                if isinstance(error, FileNotFoundError) and looks > 1:
                    # Merged since it was listed: its entries are in a segment of another name.
                    return self._open_all(step_key, looks - 1)
                logger.warning("%s: is left out, and its keys are read again", error)
                if isinstance(error, UnusableFile):
                    self._remove(path)
        return segments

    def _open(self, path: AnyPath) -> StoredSegment:
        """The segment, opened once: the same name always has the same bytes."""
        opened = path, self.is_writer
        if opened not in self._opened:
            self._opened[opened] = StoredSegment(path, is_mine=self.is_writer)
        return self._opened[opened]

    def cover(self, step_key: str, files: Sequence[AnswerFile]) -> list[StoredSegment]:
        """The segments of a step key; their writer first adds those of `files` that none covers.

        `files` are all that are published with answers under the step key.
        """
        segments = self.open(step_key)
        if not self.is_writer:
            return segments
        published = {covered_as(file.digest): file for file in files}
        known = set(chain(*(segment.covered for segment in segments)))
        for digest, file in published.items():
            if digest not in known:
                with suppress(UnusableFile):  # whoever needs its answers logs it
                    self.note(step_key, file.digest, read_keys(file))
        with self._lock:
            self._add(step_key, published.keys())
        return self.open(step_key)

    def note(self, step_key: str, digest: str, keys: Keys) -> None:
        """Keep the keys of a file that is published, or going to be, for the next segment."""
        if not self.is_writer:
            return
        with self._lock:
            self._noted.setdefault(step_key, []).append((digest, keys))
            self._noted_rows += len(keys.rows_K)
            if self._noted_rows >= NOTED_ROWS:
                self._add_all()

    def write_noted(self, step_keys: Collection[str]) -> None:
        """Write all noted keys; delete the segments of step keys other than `step_keys`."""
        if not self.is_writer:
            return
        with self._lock:
            self._add_all()
        for path in self._paths(f"*{SUFFIX}"):
            if key_in_name(path) not in step_keys:
                self._remove(path)

    def _add_all(self) -> None:
        for step_key in list(self._noted):
            self._add(step_key, None)

    def _add(self, step_key: str, published: Collection[bytes] | None) -> None:
        """Write the noted keys to a segment, merged with smaller ones.

        With `published`, the files that count, also writes again the segments of which most files
        are not published any more. A kill leaves a file covered twice, or not at all.
        """
        files = self._noted.pop(step_key, [])
        self._noted_rows -= sum(len(keys.rows_K) for _, keys in files)
        try:
            self._merge(step_key, files, published)
        except (GlmbatchError, OSError) as error:
            # The next run reads the files themselves.
            logger.warning("%s: the index of known answers is not kept: %s", self._folder, error)

    def _merge(
        self,
        step_key: str,
        files: Sequence[tuple[str, Keys]],
        published: Collection[bytes] | None,
    ) -> None:
        covered = [covered_as(digest) for digest, _ in files]
        segments = _new_segment(files)
        size = sum(map(len, segments))
        replaced = []
        for segment in reversed(self.open(step_key)):
            # Each is at least twice as large as the next, so their number grows as a logarithm.
            if len(segment) < 2 * size or (published is not None and _is_stale(segment, published)):
                stays = [published is None or digest in published for digest in segment.covered]
                numbers = np.where(stays, len(covered) + np.cumsum(stays, dtype=int) - 1, GONE)
                segments.append(_Renumbered(segment, numbers))
                covered += compress(segment.covered, stays)
                size += len(segment)
                replaced.append(segment)
        written = None
        try:
            if covered:
                written = write_segment(self._folder, step_key, merged(segments), covered)
        except UnusableFile:  # one of them is damaged; their files are read again
            for segment in replaced:
                segment.discard()
            raise
        for segment in replaced:
            if segment.path != written:
                segment.discard()

    def _paths(self, pattern: str) -> list[AnyPath]:
        try:
            return list(self._folder.glob(pattern))
        except (GlmbatchError, OSError) as error:
            logger.warning("%s: cannot be listed, and keys are read again: %s", self._folder, error)
            return []

    def _remove(self, path: AnyPath) -> None:
        if self.is_writer:
            with suppress(OSError, GlmbatchError):  # another run deletes it
                path.unlink()


def _new_segment(files: Sequence[tuple[str, Keys]]) -> list[Sorted]:
    """A segment with the keys of `files`, numbered in this order; none if there are no files."""
    parts = []
    for number, (_, keys) in enumerate(files):
        rows = keys.rows_K | np.where(keys.failed_K, FAILED, np.uint64(0))
        parts.append(Entries(keys.halves_K, places_of(number, rows)))
    return [Segment(in_order(parts))] if parts else []


class _Renumbered:
    """A segment whose files have other `numbers`, in a segment that it is merged into."""

    def __init__(self, segment: StoredSegment, numbers: np.ndarray) -> None:
        self._segment = segment
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._segment)

    def part(self, first: int, end: int) -> Entries:
        halves, places = self._segment.part(first, end)
        return Entries(halves, places_of(self._numbers[files_of(places)], rows_of(places)))


def _is_stale(segment: StoredSegment, published: Collection[bytes]) -> bool:
    return 2 * sum(digest in published for digest in segment.covered) < len(segment.covered)
