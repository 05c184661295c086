"""A night over a Delta table of many files of which three are new: what it opens, and how long.

python benchmarks/tables.py 4000      as JSON; the first night answers all files
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import write_deltalake

from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data"
ROWS = {"text": ["很好用，值得买", "The noise is so-so.", "Broke after a week"]}


def make_table(folder: Path, files: int) -> None:
    """A table of `files` files of three rows, in one commit."""
    write_deltalake(folder, pa.table(ROWS))
    adds = []
    for number in range(1, files):
        path = folder / f"{number:05}.parquet"
        pq.write_table(pa.table(ROWS), path)
        entry = {"path": path.name, "partitionValues": {}, "size": path.stat().st_size}
        adds.append(json.dumps({"add": {**entry, "modificationTime": 1, "dataChange": True}}))
    (folder / "_delta_log" / f"{1:020}.json").write_text("\n".join(adds))


def night(folder: Path) -> dict[str, Any]:
    """A run over the table; `opened` counts its files that were opened."""
    opened: set[str] = set()
    plain = pa.OSFile

    def counting(path: str, *arguments: Any) -> Any:
        if Path(path).parent == folder / "in":
            opened.add(path)
        return plain(path, *arguments)

    job = {
        "data": {"input": str(folder / "in"), "output": str(folder / "out")},
        "model": {"path": str(SAMPLE / "tiny-chatglm2")},
        "steps": [{"kind": "classify", "name": "mood", "labels": ["good", "bad"]}],
        "runtime": {"device": "cpu"},
    }
    pa.OSFile = counting
    start = time.perf_counter()
    summary = run_job(JobConfig.model_validate(job))
    seconds = time.perf_counter() - start
    pa.OSFile = plain
    return {
        "seconds": round(seconds, 1),
        "opened": len(opened),
        "unchanged": summary.unchanged_sources,
        "asked": summary.computed,
        "rows": summary.rows,
    }


def main(files: int) -> None:
    """Print both nights."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_table(folder / "in", files)
        nights = {"first": night(folder)}
        for number in range(3):
            new = pa.table({"text": [f"new row {number}"]})
            write_deltalake(folder / "in", new, mode="append")
        nights["three new"] = night(folder)
        nights["nothing new"] = night(folder)
    print(json.dumps(nights, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]))
