"""Measure how a run's time and memory grow with its fragments and with the size of its input.

    python benchmarks/scale.py fragments 1000 5000         files of 3 rows each, on SQLite
    python benchmarks/scale.py fragments 1000 5000 --postgresql            the same on PostgreSQL
    python benchmarks/scale.py megabytes 20 2000           rows of 10 kB, a few words classified
    python benchmarks/scale.py manifest 1000 100000        what is published: write, open, extend
    python benchmarks/scale.py history 10000 100000        nights over a long history, on a disk
    python benchmarks/scale.py history 10000 --s3          the same over a local S3 server

Each size runs in its own process: the flow with the sample's tiny checkpoint on CPU, and a server
of its own. Memory is the peak resident memory, read five times a second. The server's figure is the
sum over its processes, without PostgreSQL. `manifest` runs no flow: it publishes empty files with
two steps' answers, and one more beside them; its seconds are CPU time.

`history` makes that many small published files (by copying one, because answering each would take
hours) and then runs three nights in plain calls: nothing changed, one file is new, one file in a
hundred has other rows. `read_mb` are the bytes read through system calls, by the kernel's own
counter; over S3, `answered_mb` are those of all answers, beside the requests by method. The last
line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
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
        size = options.sizes[0]
        manifest = options.of == "manifest"
        print(json.dumps(measure_manifest(size) if manifest else measure(options.of, size)))
        return
    if options.of == "history":
        measure_history(options.sizes, options.s3)
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
    parser.add_argument("of", choices=("fragments", "megabytes", "manifest", "history"))
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument(
        "--postgresql", action="store_true", help="use PostgreSQL, from the `test` extra"
    )
    parser.add_argument("--s3", action="store_true", help="history: over a local S3 server")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_history(sizes: list[int], s3: bool) -> None:
    """Print what three nights cost over each of the histories."""
    from history import measure_nights  # beside this file

    measured = {}
    for size in sizes:
        measured[str(size)] = measure_nights(size, s3)
        for name, facts in measured[str(size)].items():
            print(f"{size:>7}  {name:<10}", *(f"{key} {value}" for key, value in facts.items()))
    print(json.dumps({"of": "history", "s3": s3, "sizes": measured}))


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
        write_small_files(folder / "in", size)
        job = make_job(folder, rows_per_fragment=10_000)
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
        from glmbatch.ledger.ledger import Ledger
        from glmbatch.report.counts import busy_seconds

        peak = {"flow_mb": 0, "server_mb": 0}
        threading.Thread(target=watch, args=(peak,), daemon=True).start()
        start = time.perf_counter()
        summary = annotate(job)
        seconds = time.perf_counter() - start
    asked = busy_seconds(Ledger(job.data.output).published_receipts())
    times = {"seconds": round(seconds, 1), "engine_seconds": round(asked, 1)}
    return {"fragments": summary.fragments, **times, **peak}


def measure_manifest(size: int) -> dict[str, Any]:
    """Write, open and extend a manifest of `size` files; CPU seconds, peak MB, bytes on disk."""
    from glmbatch.ledger.filelist import LISTS
    from glmbatch.ledger.ledger import ANSWERS, Ledger
    from glmbatch.ledger.manifest import MANIFEST, Manifest, published_file, write_manifest
    from glmbatch.ledger.outputs import STAGED, staged_name
    from glmbatch.ledger.publication import publish

    output = Path(tempfile.mkdtemp())
    new = make_receipt(size)
    files = tuple(published_file(make_receipt(number)) for number in range(size))
    names = [file.output_name for file in files]
    for file in files:
        names += [f"{ANSWERS}/{key}.{key}.parquet" for key in file.answers_keys]
    for name in (*names, f"{STAGED}/{staged_name(new)}"):
        path = output / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    manifest = Manifest(run="first", root="/in", files=files)
    peak_mb = {"before_mb": peak()}
    seconds = {}
    pa.array([""])  # pyarrow now imports pandas, which takes a second once in a process

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.process_time()
        made = call()
        seconds[f"{name}_seconds"] = round(time.process_time() - begin, 2)
        return made

    timed("write", lambda: write_manifest(output, manifest))
    ledger = Ledger(output)
    ledger.open("second")
    before = timed("open", ledger.manifest)
    assert before == manifest
    after = before.model_copy(update={"files": (*before.files, published_file(new))})
    timed("extend", lambda: publish(ledger, after, [new], [], lambda moved: moved))
    ledger.close("second")
    list_bytes = sum(path.stat().st_size for path in (output / LISTS).glob("*"))
    manifest_bytes = (output / MANIFEST).stat().st_size
    return {**seconds, **peak_mb, "peak_mb": peak(), "json": manifest_bytes, "list": list_bytes}


def peak() -> int:
    """The peak memory of this process until now, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make_receipt(number: int) -> Any:
    """The receipt of a published file of 3 rows and two steps, with digests of its number."""
    from glmbatch.ledger.fragments import Fragment
    from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt

    def digest(what: str) -> str:
        return sha256(f"{what} {number}".encode()).hexdigest()

    fragment = Fragment(
        source=f"day={number // 1000}/part-{number}.parquet",
        path="",
        digest=digest("source"),
        stamp=(0, 0),
        first_row=0,
        rows=3,
        row_groups=(),
        skip_rows=0,
    )
    answers = []
    for step in ("sentiment", "reply"):
        step_key = sha256(step.encode()).hexdigest()[:32]
        answers.append(
            AnswersReceipt(
                key=digest(step)[:32],
                run="first",
                fragment=fragment.name,
                step=step,
                step_key=step_key,
                rows=3,
            )
        )
    return OutputReceipt(
        key=digest("output")[:32],
        run="first",
        fragment=fragment,
        output_name=fragment.output_name,
        answers=tuple(answers),
        digest=digest("file"),
    )


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


def write_small_files(folder: Path, files: int) -> None:
    """Write that many Parquet files of 3 rows, all with texts of their own."""
    folder.mkdir(parents=True)
    for number in range(files):
        texts = [f"review {number} is good in {row}" for row in range(3)]
        pq.write_table(pa.table({"text": texts}), folder / f"{number:06}.parquet")


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
