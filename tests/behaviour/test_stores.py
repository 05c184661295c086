"""A job over an object store publishes the same as one over files, whatever the store does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import S3FileSystem

from glmbatch.cli.main import main
from glmbatch.errors import InputError, Interrupted, TransientError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.verification import verify
from glmbatch.report.text import describe
from glmbatch.run.plan import plan_run
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from glmbatch.store.files import digest_file
from glmbatch.store.locks import StoreLock
from glmbatch.store.objects.reading import kept
from tests import forked
from tests.stores import Request, Store
from tests.support import CAUSAL, Settings, Write, run, some

pytestmark = pytest.mark.slow
DAYS = {1: [f"row {n}" for n in range(12)], 2: ["one", None, "three"]}

RUN = """
import json, sys
from glmbatch.settings.job import JobConfig
from glmbatch.run.job import run_job
run_job(JobConfig.model_validate(json.loads(sys.argv[1])))
"""


@pytest.fixture
def settings(store: Store, job_settings: Settings, tmp_path: Path) -> Settings:
    """Make settings of a job with two days of input and its output in the store."""
    for day, texts in DAYS.items():
        store.put(f"in/day={day}/a.parquet", pa.table({"text": texts}))

    def there(**overrides: Any) -> dict[str, Any]:
        places = {"data__input": store.url("in"), "data__output": store.url("out")}
        cache = {"runtime__cache": str(tmp_path / "cache")}
        return job_settings(**{"max_error_rate": 0.5, **places, **cache, **overrides})

    return there


def published(store: Store, output: str = "out") -> pa.Table:
    """The published rows. Visible files must be those in the manifest, with its digests."""
    manifest = Ledger(store.url(output)).manifest()
    assert manifest is not None
    visible = store.path(output).glob("**/[!_]*.parquet")
    tables = []
    listed = []
    for file in manifest.files:
        path = store.path(f"{output}/{file.output_name}")
        assert digest_file(path) == file.digest
        tables.append(pq.read_table(pa.BufferReader(path.read_bytes())))
        listed.append(path)
    assert [path for path in visible if "/_" not in str(path)] == listed
    return pa.concat_tables(tables)


def rows_over_files(write_source: Write, job_settings: Settings, tmp_path: Path) -> pa.Table:
    for day, texts in DAYS.items():
        write_source(f"day={day}/a.parquet", {"text": texts})
    run(job_settings(max_error_rate=0.5))
    return ds.dataset(tmp_path / "out", partitioning=None).to_table()


def test_input_model_and_output_may_be_in_a_store(
    store: Store, settings: Settings, job_settings: Settings, write_source: Write, tmp_path: Path
) -> None:
    for path in CAUSAL.iterdir():
        store.path(f"models/base/{path.name}").upload(path)
    job = settings(model__path=store.url("models/base"))
    assert run(job).computed == 28
    assert published(store).equals(rows_over_files(write_source, job_settings, tmp_path))
    place = S3FileSystem(endpoint_override=store.address)
    read = pd.read_parquet(store.url("out/day=1").removeprefix("s3://"), filesystem=place)
    assert read["text"].tolist() == DAYS[1]
    again = run(job)
    assert again.computed == 0
    assert f"pandas.read_parquet('{store.url('out')}')" in describe(again)
    assert sum(step.to_run for step in preview(JobConfig.model_validate(job)).steps) == 0
    assert verify(store.url("out")).findings == ()
    assert main(["verify", store.url("out")]) == 0


def test_a_run_leaves_only_its_output_and_no_secrets(store: Store, settings: Settings) -> None:
    run(settings())
    run(settings())
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    others = set()
    reports = []
    for path in store.path("out").listed():
        assert secret not in path.read_bytes()
        name = str(path.relative_to(store.path("out")))
        if "/reports/" in name:
            reports.append(name)
        elif not any(part in name for part in ("/answers/", "/keys/", "day=")):
            others.add(name)
    assert len(reports) == 4  # two runs, each as a page and as JSON
    assert others == {
        "_manifest.json",
        "_quarantine.parquet",
        "_glmbatch/manifest.json",
        "_glmbatch/lock.00000002",
    }


def test_store_faults_do_not_change_the_answers(
    store: Store, settings: Settings, job_settings: Settings, write_source: Write, tmp_path: Path
) -> None:
    harms = ["reset", 500, "cut", "lost", 503]

    def harm(request: Request) -> str | int | None:
        at = len(store.requests)
        return harms[at // 7 % len(harms)] if at % 7 == 0 else None

    store.harm = harm
    run(settings())
    store.calm()
    assert published(store).equals(rows_over_files(write_source, job_settings, tmp_path))


def test_a_store_that_fails_on_commit_is_retried_later(store: Store, settings: Settings) -> None:
    def harm(request: Request) -> int | None:
        return 500 if "/answers/" in request.key and request.method == "PUT" else None

    store.harm = harm
    message = r"out/_glmbatch/answers/.*: the store cannot be reached now"
    with pytest.raises(TransientError, match=message):
        run(settings())
    store.calm()
    assert not [name for name in store.names("out") if name.endswith((".parquet", ".json"))]
    assert run(settings()).computed == 28


@pytest.fixture
def changed(store: Store, settings: Settings) -> Callable[[str], dict[str, Any]]:
    """Make a job over changed rows and one missing source, into a copy of an older output."""
    one_step = settings()["steps"][:1]
    store.put("in/day=3/b.parquet", pa.table({"text": ["of an earlier day"]}))
    run(settings(steps=one_step, data__output=store.url("before")))
    store.put("in/day=1/a.parquet", pa.table({"text": [f"changed {n}" for n in range(12)]}))
    store.path("in/day=3/b.parquet").unlink()

    def job(output: str) -> dict[str, Any]:
        store.copy("before", output)
        return settings(
            steps=one_step, data__output=store.url(output), data__missing_sources="drop"
        )

    return job


def free(store: Store, output: str) -> None:
    """Delete the lock, as if it had expired."""
    store.calm()
    for path in store.path(f"{output}/_glmbatch").glob("lock.*"):
        path.unlink()


def run_again(store: Store, job: dict[str, Any], output: str) -> pa.Table:
    free(store, output)
    run(job)
    return published(store, output)


def test_the_next_run_finishes_after_any_refused_change(
    store: Store, changed: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", 0)  # a list beside the manifest
    run(changed("undisturbed"))
    expected = published(store, "undisturbed")
    assert expected.column("text").to_pylist() == [*(f"changed {n}" for n in range(12)), *DAYS[2]]
    changes = [request.key for request in store.requests if request.changes]
    intent = changes.index("undisturbed/_glmbatch/publishing.json")
    assert 8 < len(changes) - intent < 34
    for last in (6, *some(range(intent, len(changes)))):  # 6: while answers are being written
        output = f"cut-{last}"
        job = changed(output)
        store.harm = refusing_after(store, last)
        try:
            run(job)
        except InputError as error:
            assert "the store refuses it" in str(error)
        else:  # the last requests write the index and the report, so they may fail silently
            assert last >= len(changes) - 5
        assert run_again(store, job, output).equals(expected)


def refusing_after(store: Store, last: int) -> Callable[[Request], int | None]:
    """A `harm` function that refuses every request after the first `last` changes."""

    def harm(request: Request) -> int | None:
        return 403 if sum(request.changes for request in store.requests) > last else None

    return harm


def test_the_next_run_finishes_a_killed_publication(
    store: Store, changed: Callable[[str], dict[str, Any]]
) -> None:
    job = changed("killed")
    store.harm = lambda request: 403 if request.key == "killed/_glmbatch/publishing.json" else None
    with pytest.raises(InputError):  # everything is staged, so the next process needs no model
        run(job)
    free(store, "killed")

    def harm(request: Request) -> str | None:
        if request.method == "PUT" and request.key.startswith("killed/day="):
            process.kill()
            return "lost"
        return None

    store.harm = harm
    process = forked.start({}, "-c", RUN, json.dumps(job))
    assert process.wait(120) == -signal.SIGKILL
    store.calm()
    with pytest.raises(InputError, match=rf"process {process.pid} of .* is writing to it"):
        run(job)
    rows = run_again(store, job, "killed")
    assert rows.column("text").to_pylist() == [*(f"changed {n}" for n in range(12)), *DAYS[2]]
    assert verify(store.url("killed")).findings == ()


# As RUN, with a lock that another run may take after two seconds without a renewal.
STALLING = RUN.replace(
    "run_job(", "from glmbatch.store.locks import StoreLock\n"
    "StoreLock.__init__.__defaults__ = (0.3, 2, None)\nrun_job(", 1,
)  # fmt: skip


@contextmanager
def stopped_holder(
    store: Store, job: dict[str, Any], at: Callable[[Request], bool], error: str
) -> Iterator[None]:
    """A run of `job` that stands still `at` a request, until the block has run.

    The request stands still too. Then the run goes on, and must fail with `error`.
    """
    stopped, goes_on = threading.Event(), threading.Event()

    def harm(request: Request) -> None:
        if at(request):
            store.harm = lambda request: None
            os.kill(process.pid, signal.SIGSTOP)
            stopped.set()
            goes_on.wait(120)

    store.harm = harm
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        process = forked.start({}, "-c", STALLING, json.dumps(job), log=Path(folder) / "log")
        patch.setattr(StoreLock.__init__, "__defaults__", (0.3, 2, None))
        try:
            assert stopped.wait(120)
            time.sleep(3)
            yield
            goes_on.set()
            os.kill(process.pid, signal.SIGCONT)
            assert process.wait(120) > 0
        finally:
            goes_on.set()
            process.kill()
        assert error in process.output(2)


@pytest.mark.parametrize("last", ["day=1/", "_manifest.json"])
def test_a_stopped_holder_changes_nothing_once_another_ran(
    store: Store, changed: Callable[[str], dict[str, Any]], last: str
) -> None:
    job = changed("stopped")

    def at(request: Request) -> bool:
        return request.method == "PUT" and request.key.startswith(f"stopped/{last}")

    with stopped_holder(store, job, at, error="this run stopped writing"):
        store.put("in/day=1/a.parquet", pa.table({"text": ["newer", "rows"]}))
        store.put("in/day=2/a.parquet", pa.table({"text": [None, "and others"]}))
        run(job)
        after = versions(store, "stopped")
    texts = published(store, "stopped").column("text").to_pylist()
    assert texts == ["newer", "rows", None, "and others"]
    assert versions(store, "stopped") == after
    assert verify(store.url("stopped")).findings == ()


def versions(store: Store, folder: str) -> dict[str, str]:
    """The version of each object in a folder, by name."""
    return {str(path): facts.version for path, facts in store.path(folder).listed().items()}


def test_refused_reads_are_not_mistaken_for_damage(store: Store, settings: Settings) -> None:
    run(settings())
    # Without its published file, a run looks for the answers of an unchanged source.
    lost = next(name for name in store.names("out") if name.endswith("-0000000000.parquet"))
    store.path(lost).unlink()
    before = store.names("out")
    kept.cache_clear()  # as if in another process

    def harm(request: Request) -> int | None:
        return 403 if request.method == "GET" and "/answers/" in request.key else None

    store.harm = harm
    with pytest.raises(InputError, match=r"/answers/.*the store refuses it"):
        run(settings())
    store.calm()
    names = store.names("out")
    assert {name for name in before if "/lock." not in name} <= set(names)


def test_a_run_that_lost_its_lock_publishes_nothing(store: Store, settings: Settings) -> None:
    def harm(request: Request) -> None:
        if "/staged/" in request.key and request.method == "PUT":
            store.harm = lambda request: None
            store.path("out/_glmbatch/lock.00000002").write_bytes(b"{}")

    store.harm = harm
    with pytest.raises(Interrupted, match="another run may have taken over"):
        run(settings(steps=settings()["steps"][:1]))
    assert not [name for name in store.names("out") if "/_glmbatch/" not in name]


def test_unsupported_stores_are_refused_before_any_work(store: Store, settings: Settings) -> None:
    refused = {
        "lies inside the input": {"data__output": store.url("in/out")},
        r"cannot be written.*Set data\.output\.": {"data__output": "s3://no-such-bucket/out"},
    }
    for message, overrides in refused.items():
        with pytest.raises(InputError, match=message):
            run(settings(**overrides))
    store.harm = lambda request: 403 if request.key.startswith("out") else None
    with pytest.raises(InputError, match=r"refuses it.*Or set data\.output\."):
        plan_run(JobConfig.model_validate(settings()))
