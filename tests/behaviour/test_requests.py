"""The requests that a run counts are those that the store gets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from glmbatch.report.report import read_report
from glmbatch.report.text import describe
from glmbatch.store.objects import access
from glmbatch.store.objects.reading import TAIL_BYTES
from glmbatch.store.objects.requests import Requests, take_requests
from tests.stores import Request, Store
from tests.support import Settings, run


def seen(requests: Sequence[Request]) -> Requests:
    """What the proxy saw, in the words of the count."""
    numbers: Counter[str] = Counter()
    for request in requests:
        kind = f"{request.method.lower()}s"
        if request.method == "GET" and not request.key:
            kind = "lists"
        elif "X-Amz-Copy-Source" in request.headers:
            kind = "copies"
        numbers["puts" if kind == "posts" else kind] += 1
    return Requests(**numbers)


def bare(requests: Requests | None) -> Requests:
    assert requests is not None
    return requests.model_copy(update={"bytes_read": 0, "bytes_written": 0})


@pytest.mark.slow
def test_a_run_counts_what_the_store_gets(store: Store, job_settings: Settings) -> None:
    for number in range(5):
        table = pa.table({"text": [f"row {row} of {number}" for row in range(9)]})
        store.put(f"in/day={number % 2}/{number}.parquet", table)
    prices = {"report__price_per_1000_writes": 5.0, "report__price_per_1000_reads": 0.4}
    places = {"data__input": store.url("in"), "data__output": store.url("out")}
    for _ in range(2):
        store.calm()
        take_requests()
        summary = run(job_settings(**places, **prices))
        later = bare(take_requests())  # of the report itself, and the lock
        total = Counter(later.model_dump()) + Counter(bare(summary.requests).model_dump())
        assert Requests(**total) == seen(store.requests)
        assert later.writes + later.reads < 20
        report = read_report(summary.output, summary.run)
        assert report is not None
        assert report.summary.requests == summary.requests
        requests = bare(summary.requests)
        cost = (requests.writes * 5.0 + requests.reads * 0.4) / 1000
        assert report.requests_cost == pytest.approx(cost)
        assert f"object store: {requests.writes:,} writes" in describe(summary)


def test_bytes_and_parts_are_counted(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "PART_BYTES", 5 << 20)
    file = tmp_path / "file"
    file.write_bytes(os.urandom(12 << 20))
    path = store.path("large")
    take_requests()
    store.calm()
    path.upload(file)
    path.download(tmp_path / "copy")
    with path.open_ranges() as opened:
        opened.seek(1000)
        assert len(opened.read(500)) == 500
    store.path("copy").copy_from(path)
    store.path("copy").unlink()
    assert not store.path("none").exists()
    taken = take_requests()
    assert bare(taken) == seen(store.requests)
    assert taken is not None
    assert taken.puts == 5  # its begin, three parts and its end
    assert taken.bytes_written == 12 << 20
    assert taken.bytes_read == (12 << 20) + TAIL_BYTES + 500  # an opened file brings its end


def test_a_run_on_a_disk_has_no_requests(write_source: Any, job_settings: Settings) -> None:
    write_source("a.parquet", {"text": ["x"]})
    take_requests()
    assert run(job_settings()).requests is None
