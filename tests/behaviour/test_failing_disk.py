"""A disk that fails at any call costs the run alone: one line, and the next run ends it.

The system's own calls are refused before they are made, by an audit hook of Python, so that no
function of ours is replaced.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import InputError, TransientError
from glmbatch.ledger.repair import repair
from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFY, Settings, Write, rows_of

READS = {"open", "os.listdir", "os.scandir"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


class Disk:
    """Below `folder`, the change number `fails_at` and all after it end with `number`."""

    def __init__(self) -> None:
        self.folder = ""
        self.changes = 0
        self.fails_at: int | None = None
        self.number = 0
        self.reading = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or not self._changes(event, arguments):
            return
        self.changes += 1
        if self.fails_at is not None and self.changes >= self.fails_at:
            # A full disk still deletes, and a lock's file is there already.
            if self.number == errno.ENOSPC and event in ("os.remove", "os.rmdir", "os.chmod"):
                return
            raise OSError(self.number, os.strerror(self.number), arguments[0])

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if self.reading and event in READS:
            return self.folder in str(arguments[0])
        if event in CHANGES:
            return self.folder in str(arguments[0])
        writes = event == "open" and isinstance(arguments[2], int)
        flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        return writes and bool(arguments[2] & flags) and self.folder in str(arguments[0])


DISK = Disk()
sys.addaudithook(DISK.hook)  # for good: Python has no way to take a hook back


@contextmanager
def failing(folder: Path, at: int | None, number: int, *, reading: bool = False) -> Iterator[Disk]:
    DISK.folder, DISK.changes, DISK.fails_at, DISK.number = str(folder), 0, at, number
    DISK.reading = reading
    try:
        yield DISK
    finally:
        DISK.folder = ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_at_any_change_costs_the_run_alone(
    number: int, write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    source = write_source("a.parquet", {"text": ["one", None, "two"]})
    gone = write_source("day=1/b.parquet", {"text": ["three"]})
    before = tmp_path / "before"

    def job(output: Path) -> JobConfig:
        return JobConfig.model_validate(
            job_settings(
                data__output=str(output), steps=[CLASSIFY], max_error_rate=0.9, runtime__retries=0
            )
        )

    run_job(job(before))
    gone.unlink()
    source.unlink()
    write_source("c.parquet", {"text": ["four", ""]})
    clean = shutil.copytree(before, tmp_path / "clean")
    with failing(clean, None, number) as disk:
        run_job(job(clean))
        changes = disk.changes
    assert changes > 20
    told = 0
    for at in range(1, changes + 1, 2):
        output = shutil.copytree(before, tmp_path / f"out-{at}")
        try:
            with failing(output, at, number):
                run_job(job(output))
        except (TransientError, InputError) as error:
            assert "\n" not in str(error)
            assert os.strerror(number) in str(error)
            told += 1
        run_job(job(output))
        assert sorted(map(str, rows_of(output))) == sorted(map(str, rows_of(clean)))
        assert verify(output).sound
        shutil.rmtree(output)
    assert told > changes // 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_output_that_cannot_be_read_is_told(
    number: int, write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["one", None]})
    job = JobConfig.model_validate(
        job_settings(steps=[CLASSIFY], max_error_rate=0.9, runtime__retries=0)
    )
    run_job(job)
    for call in (verify, repair, lambda _: preview(job), lambda _: run_job(job)):
        with failing(out, None, number, reading=True) as disk:
            call(out)
            reads = disk.changes
        assert reads
        for at in range(1, reads + 1):
            try:
                with failing(out, at, number, reading=True):
                    call(out)
            except (TransientError, InputError) as error:
                assert "\n" not in str(error)
    assert run_job(job).faulty_rows == 1
    assert verify(out).sound
