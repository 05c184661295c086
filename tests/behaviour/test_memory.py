"""Peak memory depends on the size of fragments, not of files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import CLASSIFIER, ROOT, Settings

# VmHWM rather than ru_maxrss, which starts at the memory of the parent process.
MEASURED_RUN = """
import json, sys
from glmbatch.settings.job import JobConfig
from glmbatch.run.job import run_job

rows = run_job(JobConfig.model_validate(json.loads(sys.argv[1]))).rows
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(rows, int(status["VmHWM"].split()[0]) // 1024)
"""


def write_wide_rows(path: Path, rows: int) -> None:
    """Write rows of a text and 2 kB of data that no prompt uses, all in one row group."""
    blob = np.random.default_rng(0).bytes(rows * 2000)
    columns = {
        "text": [f"text number {number % 100} is fine" for number in range(rows)],
        "blob": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2000), rows, [None, pa.py_buffer(blob)]
        ),
    }
    path.parent.mkdir()
    pq.write_table(
        pa.table(columns), path, row_group_size=rows, compression="none", use_dictionary=False
    )


@pytest.mark.slow
def test_a_file_ten_times_larger_needs_little_more_memory(
    tmp_path: Path, job_settings: Settings
) -> None:
    peaks = {}
    for rows in (10_000, 100_000):
        folder = tmp_path / str(rows)
        write_wide_rows(folder / "a.parquet", rows)
        settings = job_settings(data__input=str(folder), data__output=str(tmp_path / f"out-{rows}"))
        settings["data"]["rows_per_fragment"] = 10_000
        settings["steps"] = [{"kind": "classify", "name": "mood", "model": str(CLASSIFIER)}]
        command = [sys.executable, "-c", MEASURED_RUN, json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        answered, megabytes = map(int, done.stdout.split())
        assert answered == rows
        peaks[rows] = megabytes
    # The file grew by 180 MB.
    assert peaks[100_000] - peaks[10_000] < 80
