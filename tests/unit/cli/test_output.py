"""What a command prints where it cannot be written, or where its reader has read enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import CAUSAL, ROOT, Settings, Write, run

FULL = Path("/dev/full")
FULL_STDOUT = (
    "glmbatch: the result cannot be written to stdout: No space left on device. "
    "Free space, then run the command again; finished work is kept.\n"
)

COMMANDS = (
    ["--help"],
    ["run", "--help"],
    ["--version"],
    ["settings"],
    ["doctor", str(CAUSAL)],
    ["plan", "JOB"],
    ["plan", "JOB", "--json"],
    ["verify", "OUT"],
    ["repair", "OUT"],
    ["canary", "OUT", "CANARY"],
)


@pytest.fixture
def names(tmp_path: Path, job_settings: Settings, write_source: Write) -> dict[str, str]:
    """A job that has run, and its files by the words of `COMMANDS`."""
    write_source("a.parquet", {"text": ["x", "y"]})
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_settings()))
    run(job_settings())
    return {
        "JOB": str(path),
        "OUT": str(tmp_path / "out"),
        "CANARY": str(tmp_path / "canary.parquet"),
    }


def started(arguments: list[str], stdout: int, stderr: int, **variables: str) -> int:
    command = [sys.executable, "-m", "glmbatch.cli.main", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **variables}
    return subprocess.run(
        command, stdout=stdout, stderr=stderr, cwd=ROOT, env=environment, check=False
    ).returncode


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk_is_one_line_and_exit_code_4(
    names: dict[str, str], tmp_path: Path, buffered: str
) -> None:
    for command in COMMANDS:
        arguments = [names.get(word, word) for word in command]
        with FULL.open("w") as full, (tmp_path / "stderr").open("w") as errors:
            code = started(arguments, full.fileno(), errors.fileno(), PYTHONUNBUFFERED=buffered)
        assert ((tmp_path / "stderr").read_text(), code) == (FULL_STDOUT, 4), command


@pytest.mark.slow
def test_a_reader_who_has_read_enough_hears_nothing(names: dict[str, str], tmp_path: Path) -> None:
    for command in COMMANDS:
        reader, writer = os.pipe()
        os.close(reader)
        arguments = [names.get(word, word) for word in command]
        with (tmp_path / "stderr").open("w") as errors:
            code = started(arguments, writer, errors.fileno())
        os.close(writer)
        assert ((tmp_path / "stderr").read_text(), code) == ("", 0), command


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_faults_that_cannot_be_shown_keep_their_exit_code() -> None:
    with FULL.open("w") as full:
        for arguments in (["plan", "no-such-job.yaml"], ["plan"]):
            assert started(arguments, subprocess.DEVNULL, full.fileno()) == 2
