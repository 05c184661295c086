"""Measure what a night costs over a long history of published files.

    python benchmarks/history.py 10000 30000 100000

Each size is a folder of small Parquet files that are all published already. Three nights follow,
each in a process of its own, in plain calls, with the sample's tiny checkpoint on CPU:

    unchanged   nothing changed since the last night
    one new     one file more
    changed     one file in a hundred has other rows

Printed: seconds of wall time and of CPU, megabytes read through system calls (the kernel's own
counter, which also counts what it had cached), and the peak resident memory. The history is made by
copying one source with its published file, because answering every file first would take hours.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data"
FILES_IN_FOLDER = 1000
TEXTS = ["很好用，值得买", "The noise is so-so.", "Broke after a week"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--night", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.night:
        print(json.dumps(night(Path(options.night))))
        return
    sizes: dict[str, Any] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make_history(folder, size)
            sizes[str(size)] = {"unchanged": apart(folder)}
            write_source(folder / "in" / "new.parquet", "one new file")
            sizes[str(size)]["one new"] = apart(folder)
            for number in range(0, size, 100):
                write_source(source(folder, number), f"changed {number % 7}")
            sizes[str(size)]["changed"] = apart(folder)
        for name, facts in sizes[str(size)].items():
            print(f"{size:>7}  {name:<10}", *(f"{key} {value}" for key, value in facts.items()))
    print(json.dumps(sizes))


def source(folder: Path, number: int) -> Path:
    return folder / "in" / f"day={number // FILES_IN_FOLDER:04d}" / f"part-{number:06d}.parquet"


def write_source(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [text, *TEXTS[1:]]}), path)


def job(folder: Path) -> Any:
    from glmbatch.settings.job import JobConfig

    labels = ["positive", "neutral", "negative"]
    return JobConfig.model_validate(
        {
            "data": {
                "input": str(folder / "in"),
                "output": str(folder / "out"),
                "recheck_share": 0.0,
            },
            "model": str(SAMPLE / "tiny-chatglm2"),
            "steps": [{"kind": "classify", "name": "sentiment", "labels": labels}],
        }
    )


def make_history(folder: Path, size: int) -> None:
    """Publish one file, then copy it and its published file under `size` names."""
    from glmbatch.ledger.fragments import output_name
    from glmbatch.ledger.manifest import read_manifest, write_manifest
    from glmbatch.run.job import run_job
    from glmbatch.store.files import version_stamp

    write_source(source(folder, 0), TEXTS[0])
    run_job(job(folder))
    manifest = read_manifest(folder / "out")
    assert manifest is not None
    first = manifest.files[0]
    files = []
    for number in range(size):
        path = source(folder, number)
        name = path.relative_to(folder / "in").as_posix()
        published = folder / "out" / output_name(name, 0)
        if number:
            path.parent.mkdir(parents=True, exist_ok=True)
            published.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source(folder, 0), path)
            shutil.copyfile(folder / "out" / first.output_name, published)
        update = {
            "source": name,
            "output_name": output_name(name, 0),
            "stamp": version_stamp(path),
            "place": version_stamp(published),
        }
        files.append(replace(first, **update))
    write_manifest(folder / "out", manifest.model_copy(update={"files": tuple(files)}))


def apart(folder: Path) -> dict[str, Any]:
    """One night in a process of its own."""
    command = [sys.executable, __file__, "0", "--night", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def night(folder: Path) -> dict[str, Any]:
    from glmbatch.run.job import run_job

    before = bytes_read()
    began = time.monotonic()
    cpu = time.process_time()
    summary = run_job(job(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "read_mb": round((bytes_read() - before) / 1e6, 1),
        "peak_mb": round(peak),
        "unchanged": summary.unchanged_sources,
        "computed": summary.computed,
    }


def bytes_read() -> int:
    """Bytes that this process has read through system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


if __name__ == "__main__":
    main()
