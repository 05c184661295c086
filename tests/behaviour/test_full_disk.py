"""A disk that fills up or turns read-only gives one clear error, and the next run resumes."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import InputError, TransientError
from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from glmbatch.tuning.finetune import begin, train_run
from tests.support import CAUSAL, CLASSIFIER, Settings, Tune, Write, committed, rows_of

pytestmark = pytest.mark.slow


def mount(*arguments: str) -> bool:
    return not subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk in memory. Only root can mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or not mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)):
        pytest.skip("only root can mount a disk")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def job(write_source: Write, job_settings: Settings, tmp_path: Path) -> Callable[[Path], JobConfig]:
    for day in range(2):
        write_source(
            f"day={day}/a.parquet", {"text": [f"day {day} row {row}" for row in range(20)]}
        )
    return lambda output: JobConfig.model_validate(job_settings(data__output=str(output)))


def rows(output: Path) -> list[dict[str, Any]]:
    return sorted(rows_of(output), key=lambda row: str(row["text"]))


def test_a_full_disk_costs_only_the_current_run(
    disk: Path, job: Callable[[Path], JobConfig], tmp_path: Path
) -> None:
    run_job(job(tmp_path / "clean"))
    expected = rows(tmp_path / "clean")
    refused = 0
    for kilobytes in range(4, 140, 12):
        output = disk / f"out-{kilobytes}"
        output.mkdir()
        status = os.statvfs(disk)
        used = status.f_frsize * (status.f_blocks - status.f_bfree)
        assert mount("-o", f"remount,size={used + 1024 * kilobytes}", str(disk))
        try:
            run_job(job(output))
        except (TransientError, InputError) as error:
            assert "No space left" in str(error)
            refused += 1
        assert mount("-o", "remount,size=16m", str(disk))
        run_job(job(output))
        assert rows(output) == expected
        assert verify(output).findings == ()
    assert refused > 5


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_on_a_full_disk_is_one_line_and_resumes(
    disk: Path, tune: Tune, method: str
) -> None:
    small = {"path": str(CLASSIFIER if method == "full" else CAUSAL)}
    refused = 0
    for kilobytes in (4, 200, 1_500):
        output = disk / f"out-{kilobytes}"
        config = tune(model=small, output=str(output), training__method=method)
        run = begin(config)
        status = os.statvfs(disk)
        used = status.f_frsize * (status.f_blocks - status.f_bfree)
        assert mount("-o", f"remount,size={used + 1024 * kilobytes}", str(disk))
        try:
            train_run(config, run)
        except TransientError as error:
            assert "cannot be written: No space left" in str(error)
            assert "\n" not in str(error)
            refused += 1
        assert mount("-o", "remount,size=99m", str(disk))
        train_run(config, run)
        shutil.rmtree(output)
    assert refused > 1


def test_a_read_only_output_costs_only_the_current_run(
    disk: Path, job: Callable[[Path], JobConfig], tmp_path: Path
) -> None:
    run_job(job(tmp_path / "clean"))
    output = disk / "out"

    def protect() -> None:
        until = time.monotonic() + 60
        while not list(output.glob("_glmbatch/answers/[!.]*")) and time.monotonic() < until:
            time.sleep(0.001)
        # Bind the folder to itself, because the run keeps its lock file open in it.
        assert mount("--bind", str(output), str(output))
        assert mount("-o", "remount,bind,ro", str(output))

    protection = threading.Thread(target=protect)
    protection.start()
    with pytest.raises(
        (InputError, TransientError), match="cannot be written: Read-only file system"
    ):
        run_job(job(output))
    protection.join()
    before = committed(output)
    subprocess.run(["umount", str(output)], check=True)
    run_job(job(output))
    assert rows(output) == rows(tmp_path / "clean")
    assert verify(output).findings == ()
    assert before <= committed(output), "committed inference was repeated"
