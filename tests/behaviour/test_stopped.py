"""A run that stands still, and another run that wants its output.

On a disk the other is refused. In a store it takes over, and the first changes nothing afterwards:
test_stores.py, test_delta_stores.py and test_iceberg_stores.py show that.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog, load_catalog

from glmbatch.errors import InputError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.verification import verify
from tests import forked
from tests.soak.nights import CELLS
from tests.support import CLASSIFY, Settings, Write, run

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
    process = forked.start({}, "-c", STOPPING, json.dumps(job))
    holder = psutil.Process(process.pid)
    while process.poll() is None and holder.status() != psutil.STATUS_STOPPED:
        time.sleep(0.02)
    try:
        before = content(out)
        write_source("a.parquet", {"text": ["newer", "rows"]})
        with pytest.raises(InputError, match=f"process {process.pid} of .* is writing to it"):
            run(job)
        assert content(out) == before
        holder.resume()
        assert process.wait(120) == 0
    finally:
        process.kill()
    assert run(job).computed == 1
    assert verify(out).findings == ()
    manifest = Ledger(out).manifest()
    assert manifest is not None
    (file,) = manifest.files
    assert pq.read_table(out / file.output_name)["text"].to_pylist() == ["newer", "rows"]
