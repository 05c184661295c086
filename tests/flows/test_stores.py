"""The command line and the flow over an object store."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from deltalake import DeltaTable, write_deltalake

from glmbatch.ledger.verification import verify
from glmbatch.store.objects.access import storage_options
from tests.flows.commands import run, task_runs
from tests.stores import Store
from tests.support import CAUSAL, CLASSIFY, Settings

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


def test_a_run_over_a_store_leaves_no_local_files(
    prefect_server: dict[str, str],
    store: Store,
    job_settings: Settings,
    tmp_path: Path,
) -> None:
    store.put("in/day=1/a.parquet", pa.table({"text": [f"row {n}" for n in range(9)]}))
    for path in CAUSAL.iterdir():
        store.path(f"base/{path.name}").upload(path)
    places = {
        "data__input": store.url("in"),
        "data__output": store.url("out"),
        "model__path": store.url("base"),
    }
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump(job_settings(**places, runtime__cache=str(tmp_path / "cache")))
    )
    command = ("-m", "glmbatch.cli.main", "run", str(tmp_path / "job.yaml"))
    first = run(prefect_server, *command)
    assert first.returncode == 0, first.stderr
    assert "9 rows in 2 fragments" in first.stdout
    second = run(prefect_server, *command)
    assert "no inference was executed and no model was loaded" in second.stdout, second.stderr
    tasks = task_runs(prefect_server, 5)
    prepared = [row["state_name"] for name, row in tasks.items() if name.startswith("prepare")]
    assert prepared == ["Cached"]
    assert verify(store.url("out")).sound
    # Stored results of one output are not mistaken for those of another over the same rows.
    for out in ("other", "out"):
        again = run(prefect_server, *command, "--output", store.url(out))
        assert again.returncode == 0, again.stderr
        assert verify(store.url(out)).sound
    assert {path.name for path in tmp_path.iterdir()} == {"job.yaml", "cache"}


def test_a_flow_reads_one_version_of_a_table_into_another(
    prefect_server: dict[str, str], store: Store, job_settings: Settings, tmp_path: Path
) -> None:
    options = storage_options(store.path("in"))

    def append(*texts: str) -> None:
        rows = pa.table({"text": texts})
        write_deltalake(store.url("in"), rows, mode="append", storage_options=options)

    places = {"data__input": store.url("in"), "data__output": store.url("out")}
    settings = job_settings(**places, data__format="delta", steps=[dict(CLASSIFY)])
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = ("-m", "glmbatch.cli.main", "run", str(tmp_path / "job.yaml"))
    append("one", "two")
    first = run(prefect_server, *command)
    assert first.returncode == 0, first.stderr
    assert "reads version 0 of the Delta table" in first.stdout
    append("three")
    second = run(prefect_server, *command)
    assert "3 rows in 2 fragments" in second.stdout, second.stderr
    assert "reads version 1 of the Delta table" in second.stdout
    table = DeltaTable(store.url("out"), storage_options=storage_options(store.path("out")))
    assert table.version() == 1
    texts = table.to_pyarrow_table().column("text").to_pylist()
    assert sorted(texts) == ["one", "three", "two"]
    assert verify(store.url("out")).findings == ()
