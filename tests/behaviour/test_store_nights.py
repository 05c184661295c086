"""A night over an object store costs what is new, and trusts no stamp that says nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import UnusableFile
from glmbatch.ledger.fragments import read_fragment
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import write_manifest
from glmbatch.ledger.verification import verify
from glmbatch.run.plan import plan_run
from glmbatch.settings.job import JobConfig
from glmbatch.store import folder
from glmbatch.store.files import version_stamp
from tests.stores import BUCKET, Request, Store
from tests.support import CLASSIFY, Settings, run

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(store: Store, job_settings: Settings) -> Callable[..., dict[str, Any]]:
    """Make settings of a job of one step over a store."""

    def there(**overrides: Any) -> dict[str, Any]:
        places = {"data__input": store.url("in"), "data__output": store.url("out")}
        return job_settings(
            **{"steps": [CLASSIFY], **places, "data__recheck_share": 0.0, **overrides}
        )

    return there


def content(*texts: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


def texts_of(store: Store) -> list[str]:
    manifest = Ledger(store.url("out")).manifest()
    assert manifest is not None
    texts: list[str] = []
    for file in manifest.files:
        published = store.path(f"out/{file.output_name}").read_bytes()
        texts += pq.read_table(pa.BufferReader(published))["text"].to_pylist()
    return texts


def in_one_part(store: Store, name: str) -> None:
    """Write the object again with the same bytes, in a way that gives it another ETag."""
    place = {"Bucket": BUCKET, "Key": f"{store.folder}/{name}"}
    body = store.path(name).read_bytes()
    client = store.client
    upload = {**place, "UploadId": client.create_multipart_upload(**place)["UploadId"]}
    part = client.upload_part(**upload, PartNumber=1, Body=body)
    parts = [{"PartNumber": 1, "ETag": part["ETag"]}]
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})


def test_a_night_asks_for_no_file_that_is_published(
    store: Store, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PRICE_OF_A_LISTING", 1)  # as if there were many files
    for number in range(3):
        store.path(f"in/day={number % 2}/{number}.parquet").write_bytes(content(f"row {number}"))
    run(settings())
    published = {name for name in store.names() if "day=" in name}
    assert len(published) == 6
    store.calm()
    assert run(settings()).unchanged_sources == 3
    assert published.isdisjoint(request.key for request in store.requests)
    assert len(store.requests) < 75
    # Nor for their keys when the model is asked about something new.
    store.path("in/day=1/new.parquet").write_bytes(content("new"))
    store.calm()
    summary = run(settings())
    assert (summary.unchanged_sources, summary.computed) == (3, 1)
    assert published.isdisjoint(request.key for request in store.requests)
    assert len(store.requests) < 130
    assert verify(store.url("out")).findings == ()


def test_listings_and_looks_give_the_same_stamps(store: Store) -> None:
    store.path("in/a").write_bytes(b"one part")
    store.path("in/b").write_bytes(b"another")
    in_one_part(store, "in/b")
    listed = store.path("in").keys()
    assert listed == {name: store.path(f"in/{name}").stat() for name in "ab"}
    before = listed["b"]
    store.path("in/b").write_bytes(b"another")
    assert store.path("in").keys()["b"] != before


def test_an_etag_that_changed_costs_one_digest(
    store: Store, settings: Callable[..., dict[str, Any]], digested: list[str]
) -> None:
    for name in "ab":
        store.path(f"in/{name}.parquet").write_bytes(content(f"row {name}"))
    run(settings())
    before = texts_of(store)
    in_one_part(store, "in/a.parquet")
    digested.clear()
    for _ in range(2):
        summary = run(settings())
        assert (summary.unchanged_sources, summary.computed) == (2, 0)
        assert digested == ["a.parquet"]
    assert texts_of(store) == before


def test_a_stamp_that_lies_is_found(store: Store, settings: Callable[..., dict[str, Any]]) -> None:
    path = store.path("in/a.parquet")
    path.write_bytes(content("one"))
    run(settings())
    path.write_bytes(content("two"))
    ledger = Ledger(store.url("out"))
    manifest = ledger.manifest()
    assert manifest is not None
    files = tuple(replace(file, stamp=version_stamp(path)) for file in manifest.files)
    write_manifest(ledger.root, manifest.model_copy(update={"files": files}))
    assert run(settings()).unchanged_sources == 1
    assert texts_of(store) == ["one"]
    assert "a-0000000000.parquet" in str(verify(store.url("out")).findings)
    assert run(settings(data__recheck_share=1.0)).silently_changed == ("a.parquet",)
    assert texts_of(store) == ["two"]


def replacing(
    store: Store, name: str, changes: dict[int, bytes]
) -> Callable[[Request], str | int | None]:
    """A `harm` that writes other bytes before the n-th request about an object, by n."""
    asked = count()

    def harm(request: Request) -> None:
        if request.key == name and request.method in {"HEAD", "GET"}:
            body = changes.pop(next(asked), None)
            if body is not None:
                store.path(name).write_bytes(body)

    return harm


def rows_read(job: JobConfig) -> list[tuple[str, list[str]]]:
    """The digest and the texts of each fragment that a run could read."""
    read = []
    for fragment in plan_run(job).plan.fragments:
        try:
            batches = list(read_fragment(fragment))
        except UnusableFile as error:
            assert "was changed while the run read it" in str(error)
        else:
            read.append((fragment.digest, pa.Table.from_batches(batches)["text"].to_pylist()))
    return read


def test_a_source_replaced_while_it_is_read_is_never_mixed(
    store: Store, settings: Callable[..., dict[str, Any]]
) -> None:
    name = "in/a.parquet"
    store.path("in/b.parquet").write_bytes(content("beside"))
    first, second = content("old"), content("new")
    assert len(first) == len(second)
    texts = {sha256(first).hexdigest(): ["old"], sha256(second).hexdigest(): ["new"]}
    texts[sha256(content("beside")).hexdigest()] = ["beside"]
    job = JobConfig.model_validate(settings())
    store.path(name).write_bytes(first)
    store.calm()
    assert len(rows_read(job)) == 2
    requests = sum(request.key == name for request in store.requests)
    whole = []
    for at in range(requests):
        # It stays replaced, or is put back as it was.
        for changes in ({at: second}, {at: second, at + 1: first}, {at: second, at + 3: first}):
            store.path(name).write_bytes(first)
            store.harm = replacing(store, name, dict(changes))
            read = rows_read(job)
            store.calm()
            assert read == [(digest, texts[digest]) for digest, _ in read]
            whole.append(len(read) == 2)
    assert any(whole)
    assert not all(whole)
