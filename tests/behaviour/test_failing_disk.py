"""A disk failure at any system call costs only the current run, and the next run finishes the job.

A Python audit hook refuses the system calls before they are made, so the tests replace none of our
own functions.
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
    """Fails change number `fails_at` below `folder`, and all later ones, with errno `number`."""

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
            # A full disk can still delete files, and the lock file already exists.
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
sys.addaudithook(DISK.hook)  # permanent: Python cannot remove an audit hook


@contextmanager
def failing(folder: Path, at: int | None, number: int, *, reading: bool = False) -> Iterator[Disk]:
    DISK.folder, DISK.changes, DISK.fails_at, DISK.number = str(folder), 0, at, number
    DISK.reading = reading
    try:
        yield DISK
    finally:
        DISK.folder = ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_failing_disk_costs_only_the_current_run(
    number: int,
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if number in (errno.EIO, errno.EDQUOT):  # the manifest names a list of its files
        monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", 0)
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
    errors = 0
    for at in range(1, changes + 1, 2):
        output = shutil.copytree(before, tmp_path / f"out-{at}")
        try:
            with failing(output, at, number):
                run_job(job(output))
        except (TransientError, InputError) as error:
            assert "\n" not in str(error)
            assert os.strerror(number) in str(error)
            errors += 1
        run_job(job(output))
        assert sorted(map(str, rows_of(output))) == sorted(map(str, rows_of(clean)))
        assert verify(output).sound
        shutil.rmtree(output)
    assert errors > changes // 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_unreadable_output_gives_a_one_line_error(
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
