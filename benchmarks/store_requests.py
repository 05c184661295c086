"""Requests to a local S3 server, and seconds: nights over many small files, and a long listing.

    python benchmarks/store_requests.py [--files 1000] [--listed 10000] [--trace]

Starts moto as the server. The input is files of five rows with one classify step; the first night
answers all, the second finds nothing new, and for the third one file is new. Prints a line for
each. With --trace, also what the server was asked for in each folder, behind a proxy that takes
time itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ROWS = 5


def job(bucket: str, folder: str) -> Any:
    """A job with one question over the files in the store."""
    from glmbatch.settings.job import JobConfig

    step = {"kind": "classify", "name": "mood", "labels": ["good", "bad"]}
    return JobConfig.model_validate(
        {
            "data": {"input": f"s3://{bucket}/in", "output": f"s3://{bucket}/{folder}"},
            "model": str(ROOT / "sample_data/tiny-chatglm2"),
            "steps": [step],
            "runtime": {"device": "cpu"},
        }
    )


def put_file(bucket: str, number: int) -> None:
    """Write one file of a few rows."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    from glmbatch.store.paths import ObjectPath

    content = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {row} of {number}" for row in range(ROWS)]}), content)
    path = ObjectPath(f"s3://{bucket}/in/day={number % 10}/{number:05}.parquet")
    path.write_bytes(content.getvalue())


def show(name: str, seconds: float, counted: Any = None) -> None:
    """Print the requests since the last line, of which a report has `counted` some."""
    from glmbatch.report.facts import store_requests
    from glmbatch.store.objects.requests import Requests, take_requests

    total: Counter[str] = Counter()
    for part in (counted, take_requests()):
        total.update(part.model_dump() if part is not None else {})
    print(f"{name}: {seconds:.1f} s; {store_requests(Requests(**total))}", flush=True)


@contextmanager
def traced(store: Any, name: str) -> Iterator[None]:
    """Print what a proxy saw during the block, if there is one."""
    if store is not None:
        store.requests.clear()
    yield
    if store is not None:
        asked: Counter[str] = Counter()
        for request in store.requests:
            folder = request.key.rpartition("/")[0].partition("/day=")[0]
            asked[f"{request.method} {folder}"] += 1
        for what, times in asked.most_common(25):
            print(f"    {name}: {times:6,} {what}", flush=True)


def nights(store: Any, files: int) -> None:
    """Run the job three times."""
    from glmbatch.run.job import run_job
    from glmbatch.store.objects.requests import take_requests

    for number in range(files):
        put_file("bench", number)
    for name in ("first night", "second night", "third night"):
        if name == "third night":
            put_file("bench", files)
        take_requests()
        with traced(store, name):
            began = time.perf_counter()
            summary = run_job(job("bench", "out"))
            seconds = time.perf_counter() - began
            show(f"{name} of {files:,} files", seconds, summary.requests)


def listing(client: Any, listed: int) -> None:
    """List many objects."""
    from glmbatch.store.objects.requests import take_requests
    from glmbatch.store.paths import ObjectPath

    for number in range(listed):
        client.put_object(Bucket="bench", Key=f"listed/{number:06}", Body=b"x")
    ObjectPath("s3://bench/listed").listed("000001")
    take_requests()
    began = time.perf_counter()
    ObjectPath("s3://bench/listed").listed()
    show(f"listing of {listed:,} objects", time.perf_counter() - began)


def main() -> None:
    """Start the server and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=1_000)
    parser.add_argument("--listed", type=int, default=10_000)
    parser.add_argument("--trace", action="store_true")
    arguments = parser.parse_args()
    import boto3

    from tests.stores import ENVIRONMENT, proxied, s3_server

    log = Path(tempfile.mkdtemp()) / "log"
    with s3_server(log) as port, proxied(port) as store:
        address = store.address if arguments.trace else f"http://127.0.0.1:{port}"
        os.environ.update({**ENVIRONMENT, "AWS_ENDPOINT_URL": address})
        client = boto3.client("s3")
        client.create_bucket(Bucket="bench")
        nights(store if arguments.trace else None, arguments.files)
        if arguments.listed:
            listing(client, arguments.listed)


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    main()
