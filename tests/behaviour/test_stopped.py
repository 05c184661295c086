"""A run that stands still, and another run that wants its output.

On a disk the other is refused. In a store it takes over, and the first commits nothing afterwards;
test_stores.py and test_delta_stores.py show that for folders and for Delta tables.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog, load_catalog

from glmbatch.errors import InputError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.verification import verify
from glmbatch.store.locks import StoreLock
from tests.soak.nights import CELLS
from tests.stores import Store
from tests.support import CLASSIFY, ROOT, Settings, Write, run

pytestmark = pytest.mark.slow

# A run that stops itself while it moves its first file to where readers see it.
STOPPING = """
import json, os, signal, sys
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig

job = json.loads(sys.argv[1])
replace = os.replace

def stopping(source, target):
    if os.path.dirname(target) == job["data"]["output"] and str(target).endswith(".parquet"):
        os.replace = replace
        os.kill(os.getpid(), signal.SIGSTOP)
    replace(source, target)

os.replace = stopping
run_job(JobConfig.model_validate(job))
"""

# A run that stops itself before it commits to its table, with a short-lived lock.
STOPPING_COMMIT = """
import json, os, signal, sys
from pyiceberg.catalog.sql import SqlCatalog
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from glmbatch.store.locks import StoreLock

StoreLock.__init__.__defaults__ = (0.3, 2, None)
commit = SqlCatalog.commit_table

def stopping(*arguments):
    SqlCatalog.commit_table = commit
    os.kill(os.getpid(), signal.SIGSTOP)
    return commit(*arguments)

SqlCatalog.commit_table = stopping
run_job(JobConfig.model_validate(json.loads(sys.argv[1])))
"""
TABLE = "lake/shop.reviews"


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """The catalogue of Iceberg tables."""
    address = f"sqlite:///{tmp_path}/lake.db"
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", address)
    catalog = load_catalog("lake", uri=address)  # it has read the variables when it was imported
    catalog.create_namespace("shop")
    return catalog


def content(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("table", sorted({cell.table for cell in CELLS}))
def test_a_stopped_holder_on_a_disk_keeps_its_lock(
    write_source: Write, job_settings: Settings, out: Path, table: str, catalog: Catalog
) -> None:
    write_source("a.parquet", {"text": ["older", "rows"]})
    named = {"data__table": TABLE} if table == "iceberg" else {}
    job = job_settings(steps=[CLASSIFY], data__format=table, **named)
    run(job)
    write_source("a.parquet", {"text": ["rows", "of the holder"]})
    with subprocess.Popen([sys.executable, "-c", STOPPING, json.dumps(job)], cwd=ROOT) as process:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        before = content(out)
        write_source("a.parquet", {"text": ["newer", "rows"]})
        with pytest.raises(InputError, match=f"process {process.pid} of .* is writing to it"):
            run(job)
        assert content(out) == before
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 0
    assert run(job).computed == 1
    assert verify(out).findings == ()
    manifest = Ledger(out).manifest()
    assert manifest is not None
    (file,) = manifest.files
    assert pq.read_table(out / file.output_name)["text"].to_pylist() == ["newer", "rows"]


def test_a_stopped_holder_commits_no_snapshot_in_a_store(
    store: Store, job_settings: Settings, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run has the rows that are published, so without a fence it would commit none."""
    monkeypatch.setattr(StoreLock.__init__, "__defaults__", (0.3, 2, None))
    places = {"data__input": store.url("in"), "data__output": store.url("out")}
    table = {"data__format": "iceberg", "data__table": TABLE}
    job = job_settings(steps=[CLASSIFY], **places, **table)
    store.put("in/a.parquet", pa.table({"text": ["older", "rows"]}))
    run(job)
    store.put("in/a.parquet", pa.table({"text": ["of", "the holder"]}))
    command = [sys.executable, "-c", STOPPING_COMMIT, json.dumps(job)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        time.sleep(3)
        store.put("in/a.parquet", pa.table({"text": ["older", "rows"]}))
        run(job)
        before = catalog.load_table("shop.reviews").current_snapshot()
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) != 0
        assert b"another commit came between" in process.stderr.read()
    endpoint = {"s3.endpoint": store.address}
    reader = load_catalog("lake", **catalog.properties, **endpoint)
    after = reader.load_table("shop.reviews")
    assert after.current_snapshot() == before
    assert sorted(after.scan().to_arrow()["text"].to_pylist()) == ["older", "rows"]
    assert verify(store.url("out")).findings == ()
