"""Measure how a run's time and memory grow with its fragments and with the size of its input.

    python benchmarks/scale.py fragments 1000 4000         a row each: Prefect's cost, on SQLite
    python benchmarks/scale.py fragments 1000 4000 --postgresql            the same on PostgreSQL
    python benchmarks/scale.py megabytes 20 2000           rows of 10 kB, a few words classified

Each size runs in its own process: the flow with the sample's tiny checkpoint on CPU, and a server
of its own. Memory is the peak resident memory, read five times a second. The server's figure is the
sum over its processes, without PostgreSQL. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data"
ROW_BYTES = 10_000
FILES = 10
ROWS_WRITTEN = 1000  # at once, so that writing a 2 GB input does not add to the memory measured


def main() -> None:
    options = _options()
    if options.one:
        print(json.dumps(measure(options.of, options.sizes[0])))
        return
    sizes: dict[str, Any] = {}
    for size in options.sizes:
        sizes[str(size)] = measure_apart(options.of, size, options.postgresql)
        facts = [f"{key} {value}" for key, value in sizes[str(size)].items()]
        print(f"{size:>6} {options.of}", *facts, sep="  ")
    database = "postgresql" if options.postgresql else "sqlite"
    print(json.dumps({"of": options.of, "database": database, "sizes": sizes}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("of", choices=("fragments", "megabytes"))
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument(
        "--postgresql", action="store_true", help="use PostgreSQL, from the `test` extra"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_apart(of: str, size: int, postgresql: bool) -> dict[str, Any]:
    """Run `measure` in its own process, with its own folder and database."""
    command = [sys.executable, __file__, of, str(size), "--one"]
    with tempfile.TemporaryDirectory() as scratch, database_settings(postgresql) as settings:
        environment = {
            **os.environ,
            **settings,
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
            "TMPDIR": scratch,
            "PREFECT_HOME": f"{scratch}/prefect",
        }
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


@contextlib.contextmanager
def database_settings(postgresql: bool) -> Iterator[dict[str, str]]:
    """Environment variables for a Prefect server on a new PostgreSQL database; none for SQLite."""
    if not postgresql:
        yield {}
        return
    from tests.postgresql import postgresql_server

    with postgresql_server() as url:
        yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}


def measure(of: str, size: int) -> dict[str, Any]:
    """Run the flow over an input of that size; return seconds and peak memory in MB."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    from glmbatch.cli.server import own_server

    folder = Path(tempfile.mkdtemp())
    if of == "fragments":
        write_input(folder / "in", rows=size, padding=0)
        job = make_job(folder, rows_per_fragment=1)
    else:
        write_input(folder / "in", rows=size * 10**6 // ROW_BYTES, padding=ROW_BYTES)
        job = make_job(folder, rows_per_fragment=1000)
    with (
        own_server() as client,
        temporary_settings(
            {
                PREFECT_API_URL: client["PREFECT_API_URL"],
                PREFECT_API_AUTH_STRING: client["PREFECT_API_AUTH_STRING"],
            }
        ),
    ):
        # Imported here, because the parent process needs no Prefect.
        from flows.annotate import annotate

        peak = {"flow_mb": 0, "server_mb": 0}
        threading.Thread(target=watch, args=(peak,), daemon=True).start()
        start = time.perf_counter()
        summary = annotate(job)
        seconds = time.perf_counter() - start
    return {"fragments": summary.fragments, "seconds": round(seconds, 1), **peak}


def make_job(folder: Path, rows_per_fragment: int) -> Any:
    from glmbatch.config import JobConfig

    step = {"kind": "classify", "name": "sentiment", "labels": ["positive", "negative"]}
    return JobConfig.model_validate(
        {
            "data": {
                "input": str(folder / "in"),
                "output": str(folder / "out"),
                "rows_per_fragment": rows_per_fragment,
            },
            "model": {"path": str(SAMPLE / "tiny-chatglm2")},
            "steps": [step],
            "runtime": {"device": "cpu"},
        }
    )


def write_input(folder: Path, rows: int, padding: int) -> None:
    """Write `rows` distinct texts to ten Parquet files, each with `padding` random bytes."""
    folder.mkdir(parents=True)
    numbers = random.Random(0)
    schema = pa.schema({"text": pa.string(), "notes": pa.string()})
    for file in range(min(FILES, rows)):
        path = folder / f"{file}.parquet"
        own_rows = range(file, rows, FILES)
        # Not compressed, so that a run reads all bytes of the padding.
        with pq.ParquetWriter(path, schema, compression="none") as writer:
            for first in range(0, len(own_rows), ROWS_WRITTEN):
                texts = [f"review {n} is good" for n in own_rows[first : first + ROWS_WRITTEN]]
                notes = [numbers.randbytes(padding // 2).hex() for _ in texts]
                writer.write_table(pa.table({"text": texts, "notes": notes}, schema))


def watch(peak: dict[str, int]) -> None:
    """Record in `peak` the peak memory of this process and of its children (the server)."""
    flow = psutil.Process()
    while True:
        with contextlib.suppress(psutil.Error):  # a child may end during the reading
            server = sum(child.memory_info().rss for child in flow.children(recursive=True))
            peak["server_mb"] = max(peak["server_mb"], server // 2**20)
        peak["flow_mb"] = max(peak["flow_mb"], flow.memory_info().rss // 2**20)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
