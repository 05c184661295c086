"""The nights of `scale.py history`: each in a process of its own, on a disk or over S3.

python benchmarks/history.py PLACE      one night over what `make_history` made, as JSON
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from tests.stores import Store

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data"
FILES_IN_FOLDER = 1000
TEXTS = ["很好用，值得买", "The noise is so-so.", "Broke after a week"]


@dataclass(frozen=True)
class Place:
    """Where a history is; `store` counts the requests to it if it is in a store."""

    address: str
    store: Store | None = None


def measure_nights(size: int, s3: bool) -> dict[str, Any]:
    """Nights over `size` published files: a first one, nothing changed, one new, 1 % changed.

    The first finds one new file too. The history was copied, so that night makes its index of known
    answers, as a history that was answered has it already.
    """
    nights: dict[str, Any] = {}
    with on_s3() if s3 else on_disk() as place:
        make_history(place.address, size)
        write(f"{place.address}/in/first.parquet", source_bytes("the first new file"))
        nights["first"] = night_apart(place)
        time.sleep(3)  # until its stamp counts
        nights["unchanged"] = night_apart(place)
        write(f"{place.address}/in/new.parquet", source_bytes("one new file"))
        nights["one new"] = night_apart(place)
        for number in range(0, size, 100):
            write(f"{place.address}/in/{source(number)}", source_bytes(f"changed {number % 7}"))
        nights["changed"] = night_apart(place)
    return nights


@contextmanager
def on_disk() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as scratch:
        yield Place(scratch)


@contextmanager
def on_s3() -> Iterator[Place]:
    """A place in a bucket of an S3 server in a process of its own, behind a proxy that counts."""
    from tests.stores import s3_store

    # The tests' timeout of one second is too short for a thousand keys of a busy server.
    os.environ["AWS_MAX_ATTEMPTS"] = "5"
    with tempfile.TemporaryDirectory() as scratch, s3_store(Path(scratch) / "log") as store:
        os.environ["FSSPEC_S3"] = "{}"
        store.folder = "history"
        yield Place(store.url("").rstrip("/"), store)


def source(number: int) -> str:
    return f"day={number // FILES_IN_FOLDER:04d}/part-{number:06d}.parquet"


def source_bytes(text: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [text, *TEXTS[1:]]}), file)
    return file.getvalue()


def write(address: str, content: bytes) -> None:
    from glmbatch.store.folder import Folder

    path = Folder(address).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def job(address: str) -> Any:
    from glmbatch.settings.job import JobConfig

    labels = ["positive", "neutral", "negative"]
    return JobConfig.model_validate(
        {
            "data": {
                "input": f"{address}/in",
                "output": f"{address}/out",
                "recheck_share": 0.0,
            },
            "model": str(SAMPLE / "tiny-chatglm2"),
            "steps": [{"kind": "classify", "name": "sentiment", "labels": labels}],
        }
    )


def make_history(address: str, size: int) -> None:
    """Publish one file, then write it and its published file under `size` names.

    Answering each of them first would take hours.
    """
    from glmbatch.ledger.fragments import output_name
    from glmbatch.ledger.manifest import read_manifest, write_manifest
    from glmbatch.run.job import run_job
    from glmbatch.store.folder import Folder

    content = source_bytes(TEXTS[0])
    write(f"{address}/in/{source(0)}", content)
    run_job(job(address))
    inputs, output = Folder(f"{address}/in"), Folder(f"{address}/out")
    manifest = read_manifest(output.path)
    assert manifest is not None
    first = manifest.files[0]
    published = (output / first.output_name).read_bytes()
    sources = [source(number) for number in range(size)]
    names = [output_name(name, 0) for name in sources]

    def copy(number: int) -> None:
        write(f"{address}/in/{sources[number]}", content)
        write(f"{address}/out/{names[number]}", published)

    for _ in output.map(copy, range(1, size)):
        pass
    files = []
    stamps = zip(inputs.stamps(sources, size), output.stamps(names, size), strict=True)
    for number, (stamp, place) in enumerate(stamps):
        update = {"source": sources[number], "output_name": names[number]}
        files.append(replace(first, **update, stamp=stamp, place=place))
    write_manifest(output.path, manifest.model_copy(update={"files": tuple(files)}))


def night_apart(place: Place) -> dict[str, Any]:
    """One night in a process of its own."""
    if place.store is not None:
        place.store.requests.clear()
    command = [sys.executable, __file__, place.address]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if place.store is not None:
        requests = place.store.requests
        methods = Counter(request.method if request.key else "LIST" for request in requests)
        facts |= {"requests": len(requests), **methods}
        facts["answered_mb"] = round(sum(request.answered for request in requests) / 1e6, 1)
    return facts


def night(address: str) -> dict[str, Any]:
    from glmbatch.run.job import run_job

    before = bytes_read()
    began = time.monotonic()
    cpu = time.process_time()
    summary = run_job(job(address))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "read_mb": round((bytes_read() - before) / 1e6, 1),
        "peak_mb": round(peak),
        "unchanged": summary.unchanged_sources,
        "fragments": summary.fragments - summary.unchanged_sources,
        "computed": summary.computed,
    }


def bytes_read() -> int:
    """Bytes that this process has read through system calls; those of sockets are not in it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


if __name__ == "__main__":
    print(json.dumps(night(sys.argv[1])))
