"""How time and memory of a run grow with its fragments, and with the bytes of its input.

    python benchmarks/scale.py fragments 1000 4000                    a row each; Prefect's own cost, on SQLite
    python benchmarks/scale.py fragments 1000 4000 --postgresql       the same on PostgreSQL
    python benchmarks/scale.py megabytes 20 2000                      rows of 10 kB, of which a few words are classified

Each size is a process of its own: the flow with the sample's tiny checkpoint on CPU, under a server started for it.
Memory is the most that was resident, looked at five times a second; the server's is that of all its processes,
PostgreSQL not among them. The last line is one JSON object.
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

ROW_BYTES = 10_000
FILES = 10


def main() -> None:
    options = _options()
    if options.one:
        print(json.dumps(measure(options.of, options.sizes[0])))
        return
    sizes: dict[str, Any] = {}
    for size in options.sizes:
        command = [sys.executable, __file__, options.of, str(size), "--one"]
        with tempfile.TemporaryDirectory() as scratch, database(options.postgresql) as url:
            quiet = {"PREFECT_LOGGING_LEVEL": "ERROR", "PREFECT_SERVER_LOGGING_LEVEL": "ERROR"}
            environment = {
                **os.environ,
                **quiet,
                **url,
                "TMPDIR": scratch,
                "PREFECT_HOME": f"{scratch}/prefect",
            }
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
        sizes[str(size)] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{size:>6} {options.of}",
            *(f"{key} {value}" for key, value in sizes[str(size)].items()),
            sep="  ",
        )
    print(
        json.dumps(
            {
                "of": options.of,
                "database": "postgresql" if options.postgresql else "sqlite",
                "sizes": sizes,
            }
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("of", choices=("fragments", "megabytes"))
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument(
        "--postgresql", action="store_true", help="one of its own, from the extra test"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@contextlib.contextmanager
def database(postgresql: bool) -> Iterator[dict[str, str]]:
    """The setting that makes a Prefect server use a database of its own; none for SQLite."""
    if not postgresql:
        yield {}
        return
    from tests.postgresql import postgresql_server

    with postgresql_server() as url:
        yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}


def measure(of: str, size: int) -> dict[str, Any]:
    """Run the flow over an input of that size; seconds, and the most memory in MB."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from glmbatch.cli.server import own_server
    from glmbatch.settings.job import JobConfig

    folder = Path(tempfile.mkdtemp())
    rows, padding, rows_per_fragment = (
        (size, 0, 1) if of == "fragments" else (size * 100, ROW_BYTES, 1000)
    )
    write_input(folder / "in", rows, padding)
    job = JobConfig.model_validate(
        {
            "data": {
                "input": str(folder / "in"),
                "output": str(folder / "out"),
                "rows_per_fragment": rows_per_fragment,
            },
            "model": {"path": str(ROOT / "sample_data" / "tiny-chatglm2")},
            "steps": [
                {"kind": "classify", "name": "sentiment", "labels": ["positive", "negative"]}
            ],
            "runtime": {"device": "cpu"},
        }
    )
    with own_server() as address, temporary_settings({PREFECT_API_URL: address}):
        from flows.annotate import annotate

        most = {"flow_mb": 0, "server_mb": 0}
        threading.Thread(target=watch, args=(most,), daemon=True).start()
        began = time.perf_counter()
        summary = annotate(job)
        seconds = time.perf_counter() - began
    return {"fragments": summary.fragments, "seconds": round(seconds, 1), **most}


def write_input(folder: Path, rows: int, padding: int) -> None:
    """Parquet files of `rows` short texts, all different, beside a column of `padding` random bytes for each."""
    folder.mkdir(parents=True)
    numbers = random.Random(0)
    for file in range(FILES):
        writer = None
        of_file = range(file, rows, FILES)
        for first in range(0, len(of_file), 1000):
            texts = [f"review {row} is good" for row in of_file[first : first + 1000]]
            notes = [numbers.randbytes(padding // 2).hex() for _ in texts]
            table = pa.table({"text": texts, "notes": notes})
            writer = writer or pq.ParquetWriter(
                folder / f"{file}.parquet", table.schema, compression="none"
            )
            writer.write_table(table)
        if writer is not None:
            writer.close()


def watch(most: dict[str, int]) -> None:
    """Note the most memory of this process and of its children, the server's."""
    flow = psutil.Process()
    while True:
        with contextlib.suppress(psutil.Error):
            server = sum(child.memory_info().rss for child in flow.children(recursive=True))
            most["server_mb"] = max(most["server_mb"], server // 2**20)
        most["flow_mb"] = max(most["flow_mb"], flow.memory_info().rss // 2**20)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
