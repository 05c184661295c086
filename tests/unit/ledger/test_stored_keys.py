"""The index on disk finds what the files themselves have, whatever happened to it."""

from __future__ import annotations

import errno
import logging
import os
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmbatch.errors import TransientError
from glmbatch.ledger.known import answers, keeping, stored
from glmbatch.ledger.known.answers import KnownAnswers
from glmbatch.ledger.known.keeping import StoredKeys
from glmbatch.ledger.known.keys import AnswerFile
from glmbatch.ledger.known.segments import Entries, places_of
from glmbatch.ledger.known.stored import KEYS, StoredSegment, write_segment
from glmbatch.ledger.ledger import Ledger
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.support import Settings, Write
from tests.unit.ledger.test_known import HASHED, SCHEMA, found, write

STEP_KEY = "5" * 32


class Killed(BaseException):
    """Ends a call where a kill would."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_ROWS", 4)
    monkeypatch.setattr(stored, "BLOCK_BYTES", 64)
    monkeypatch.setattr(keeping, "NOTED_ROWS", 10)


def published(path: Path, keys: list[bytes | None], failed: int = 0) -> AnswerFile:
    """A published file; the last `failed` of its rows failed."""
    errors = [None] * (len(keys) - failed) + ["not finite"] * failed
    file = write(path, list(keys), errors[-len(keys) :] if keys else [])
    return AnswerFile(file.path, file.step, file.digest, is_published=True)


def writer(folder: Path) -> StoredKeys:
    index = StoredKeys(folder / "keys")
    index.is_writer = True
    return index


def known(files: list[AnswerFile], index: StoredKeys | None, failed: bool = False) -> KnownAnswers:
    segments = [] if index is None else index.cover(STEP_KEY, files)
    return KnownAnswers(files, "mood", SCHEMA, include_failed=failed, stored=segments)


def segment_files(folder: Path) -> list[Path]:
    return sorted((folder / "keys").glob("*.keys"))


ONE_FILE = st.tuples(
    st.lists(st.one_of(st.none(), HASHED), max_size=14), st.integers(0, 3), st.booleans()
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(nights=st.lists(st.lists(ONE_FILE, max_size=3), max_size=5), failed=st.booleans())
def test_the_same_answers_are_found_as_without_it(
    nights: list[list[tuple[list[bytes | None], int, bool]]],
    failed: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("output")
    files: list[AnswerFile] = []
    asked = {b"\xff" * 16, b"\x00" * 16}
    for night, new in enumerate(nights):
        for number, (keys, failures, drops) in enumerate(new):
            if drops and files:
                files.pop(0)
            path = folder / f"{night}-{number}.parquet"
            files.append(published(path, keys, min(failures, len(keys))))
            asked |= {key for key in keys if key is not None}
        with_index = known(files, writer(folder), failed)
        without = known(files, None, failed)
        assert found(with_index, asked).keys() == found(without, asked).keys()
        for key in () if failed else asked:  # a key may have failed in one file alone
            assert found(with_index, {key}) == found(without, {key})
        sizes = [len(segment) for segment in StoredKeys(folder / "keys").open(STEP_KEY)]
        for larger, smaller in pairwise(sizes):
            assert larger >= 2 * smaller


def test_only_new_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[AnswerFile] = []

    def counted(file: AnswerFile) -> Any:
        opened.append(file)
        return keys_in(file)

    keys_in = keeping.read_keys
    monkeypatch.setattr(keeping, "read_keys", counted)
    monkeypatch.setattr(answers, "read_keys", counted)
    files = [published(tmp_path / f"{n}.parquet", [bytes([n]) * 16]) for n in range(20)]
    known(files, writer(tmp_path))
    assert opened == files
    files.append(published(tmp_path / "new.parquet", [b"n" * 16]))
    assert found(known(files, writer(tmp_path)), {b"n" * 16, bytes(16)}).keys() == {
        b"n" * 16,
        bytes(16),
    }
    assert opened == files
    known(files, StoredKeys(tmp_path / "keys"))
    assert opened == files


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_segment_is_read_again_from_files(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [os.urandom(16) for _ in range(10)]
    files = [published(tmp_path / "a.parquet", list(keys))]
    known(files, writer(tmp_path))
    (path,) = segment_files(tmp_path)
    whole = path.read_bytes()
    places = range(0, len(whole), 5) if damage == "flip" else [0, 7, len(whole) - 1]
    for at in places:
        flipped = whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]
        path.write_bytes({"flip": flipped, "cut": whole[:at], "empty": b""}[damage])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            reader = known(files, StoredKeys(tmp_path / "keys"))
            assert found(reader, set(keys)) == {key: key.hex() for key in keys}
        assert "read again" in caplog.text
        path.write_bytes(whole)


def test_damaged_segments_are_written_again(tmp_path: Path) -> None:
    keys = [os.urandom(16) for _ in range(10)]
    files = [published(tmp_path / "a.parquet", list(keys))]
    known(files, writer(tmp_path))
    (path,) = segment_files(tmp_path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for _ in range(2):  # the first finds the damage when it looks a key up
            assert found(known(files, writer(tmp_path)), set(keys)).keys() == set(keys)
        assert [file.read_bytes() for file in segment_files(tmp_path)] == [whole]


@pytest.mark.parametrize("name", ["replace", "unlink"])
def test_killed_anywhere_it_finds_the_same_answers(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = getattr(os, name)

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise Killed
        return original(*arguments, **options)

    files: list[AnswerFile] = []
    for number in range(12):
        keys: list[bytes | None] = [bytes([number, row]) * 8 for row in range(1 + number % 5)]
        files.append(published(tmp_path / f"{number}.parquet", keys))
        if number % 4 == 3:
            del files[0]
        with monkeypatch.context() as patch:
            patch.setattr(os, name, dying)
            with suppress(Killed):
                known(files, writer(tmp_path))
        asked = {bytes([n, row]) * 8 for n in range(12) for row in range(5)}
        expected = found(known(files, None), asked)
        assert found(known(files, StoredKeys(tmp_path / "keys")), asked) == expected
    assert calls > 3
    assert found(known(files, writer(tmp_path)), asked) == expected


def test_a_full_disk_costs_only_the_new_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = [published(tmp_path / "a.parquet", [b"a" * 16])]
    known(files, writer(tmp_path))
    before = segment_files(tmp_path)
    files.append(published(tmp_path / "b.parquet", [b"b" * 16]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        both = known(files, writer(tmp_path))
    assert found(both, {b"a" * 16, b"b" * 16}).keys() == {b"a" * 16, b"b" * 16}
    assert "is not kept" in caplog.text
    assert segment_files(tmp_path) == before


def test_segments_merged_since_the_listing_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [bytes([number]) * 16 for number in range(8)]
    files = [published(tmp_path / "a.parquet", list(keys[:7]))]
    files.append(published(tmp_path / "b.parquet", [keys[7]]))
    known(files[:1], writer(tmp_path))
    plain = keeping.StoredSegment
    merging = [True]

    def opened(path: Path, **options: Any) -> StoredSegment:
        if options == {"is_mine": False} and merging:
            merging.clear()
            path.rename(path.with_name("gone"))
            known(files, writer(tmp_path))  # covers both in a segment of another name
        return plain(path, **options)

    monkeypatch.setattr(keeping, "StoredSegment", opened)
    monkeypatch.setattr(answers, "read_keys", None)
    reader = known(files, StoredKeys(tmp_path / "keys"))
    assert found(reader, set(keys)).keys() == set(keys)
    assert caplog.text == ""


def test_segments_are_not_opened_during_a_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [published(tmp_path / "a.parquet", [b"a" * 16])]
    index = writer(tmp_path)
    other = threading.Thread(target=index.open, args=[STEP_KEY])

    def merging(*arguments: Any) -> Path:
        other.start()
        other.join(0.2)
        assert other.is_alive(), "it waits for the merge"
        return write_segment(*arguments)

    monkeypatch.setattr(keeping, "write_segment", merging)
    known(files, index)
    other.join()


@pytest.mark.parametrize("failed", [1, 2])
def test_failed_rows_in_a_segment_are_no_answers(tmp_path: Path, failed: int) -> None:
    files = [published(tmp_path / "a.parquet", [b"a" * 16, b"b" * 16], failed)]
    known(files, writer(tmp_path))
    assert known(files, StoredKeys(tmp_path / "keys")).any_answer == (failed < 2)
    files.append(published(tmp_path / "b.parquet", [b"c" * 16]))
    assert known(files, StoredKeys(tmp_path / "keys")).any_answer
    assert not known([], StoredKeys(tmp_path / "keys")).any_answer


def test_a_damaged_segment_does_not_hide_an_answer(tmp_path: Path) -> None:
    files = [published(tmp_path / "a.parquet", [b"a" * 16])]
    known(files, writer(tmp_path))
    (path,) = segment_files(tmp_path)
    path.write_bytes(b"?" + path.read_bytes()[1:])
    assert known(files, StoredKeys(tmp_path / "keys")).any_answer


@pytest.mark.slow
def test_ten_million_keys_take_less_than_a_megabyte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    rows, step = 10_000_000, np.uint64(1_000_000_007)

    def parts() -> Iterator[Entries]:
        for start in range(0, rows, 1_000_000):
            numbers = np.arange(start, start + 1_000_000, dtype=np.uint64)
            yield Entries(numbers * step, places_of(0, numbers))

    (tmp_path / "keys").mkdir()
    path = write_segment(tmp_path / "keys", STEP_KEY, parts(), [bytes(16)])
    assert path.stat().st_size < 24 * rows
    tracemalloc.start()
    segment = StoredSegment(path)
    wanted = np.sort(np.random.default_rng(0).integers(0, rows, 500)).astype(np.uint64)
    places = segment.find(np.unique(wanted) * step, np.array([7]), failed=False)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (places == places_of(7, np.unique(wanted))).all()
    assert peak_bytes < 1 << 20


def test_a_run_writes_and_uses_it_and_can_do_without(
    write_source: Write, job_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    job = JobConfig.model_validate(job_settings())
    for number in range(4):
        write_source(f"{number}.parquet", {"text": [f"row {number}", "the same"]})
    run_job(job)
    index = Path(job.data.output) / "_glmbatch/keys"
    assert len(list(index.glob("*.keys"))) == len(job.steps)
    read: list[AnswerFile] = []
    monkeypatch.setattr(keeping, "read_keys", read.append)
    write_source("new.parquet", {"text": ["row 2", "the same"]})
    assert run_job(job).computed == 0
    assert not read, "what a run publishes it has noted"
    monkeypatch.undo()
    for path in index.iterdir():
        path.unlink()
    index.rmdir()
    write_source("newer.parquet", {"text": ["row 3"]})
    assert run_job(job).computed == 0


def test_a_complete_publication_survives_its_index(
    write_source: Write,
    job_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise TransientError("the disk is gone")

    job = JobConfig.model_validate(job_settings())
    write_source("a.parquet", {"text": ["a"]})
    monkeypatch.setattr(StoredKeys, "write_noted", refuse)
    assert run_job(job).rows == 1
    assert "the disk is gone" in caplog.text
    assert run_job(job).computed == 0


def test_files_staged_by_a_killed_run_are_in_the_index(
    write_source: Write, job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    job = JobConfig.model_validate(job_settings())
    write_source("a.parquet", {"text": ["a", "b"]})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("glmbatch.run.job.publish", die)
        run_job(job)
    assert run_job(job).computed == 0
    ledger = Ledger(job.data.output)
    manifest = ledger.manifest()
    assert manifest is not None
    for step_key in manifest.files[0].step_keys.values():
        (segment,) = StoredKeys(ledger.root / KEYS).open(step_key)
        assert len(segment) == 2


def die(*_: object, **__: object) -> None:
    raise Killed


def test_looking_for_a_spare_deletes_nothing(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    job = JobConfig.model_validate(job_settings())
    write_source("a.parquet", {"text": ["a"]})
    run_job(job)
    ledger = Ledger(job.data.output)
    manifest = ledger.manifest()
    assert manifest is not None
    for step_key in manifest.files[0].step_keys.values():
        (file,) = ledger.answer_files(step_key)
        spare = ledger.find_spare(file)
        assert spare is not None
        spare.path.write_bytes(b"damaged")
        assert Ledger(job.data.output).find_spare(file) is None
        assert spare.path.read_bytes() == b"damaged"
