"""Outputs of an earlier version can be read, verified and reused without any inference.

`tests/fixtures/earlier/` was written before the modules moved: an input, its job and three outputs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from glmbatch.cli.main import main
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.report.summary import Summary
from glmbatch.run.job import run_job
from glmbatch.settings.jobfile import load_job
from tests.support import CAUSAL, EARLIER, copy_earlier

ROWS = 24
FORMATS = ["parquet", "delta"]


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    return copy_earlier(tmp_path)


def run(earlier: Path, output: str, **settings: Any) -> Summary:
    """Run the earlier version's job over one of its outputs."""
    places = {"input": earlier / "in", "output": earlier / output}
    overrides: dict[str, object] = {f"data.{name}": str(path) for name, path in places.items()}
    overrides |= {"model.path": str(CAUSAL), **settings}
    if output == "delta":
        overrides["data.format"] = "delta"
    return run_job(load_job(str(EARLIER / "job.yaml"), overrides))


def rows(output: Path) -> list[dict[str, Any]]:
    """The published rows, in the order of the manifest."""
    manifest = Ledger(output).manifest()
    assert manifest is not None
    rows: list[dict[str, Any]] = []
    for file in manifest.files:
        rows += pq.ParquetFile(output / file.output_name).read().to_pylist()
    return rows


@pytest.mark.parametrize("output", FORMATS)
def test_an_earlier_output_passes_verification(earlier: Path, output: str) -> None:
    assert main(["verify", str(earlier / output)]) == 0


@pytest.mark.parametrize("output", FORMATS)
def test_an_earlier_output_needs_no_inference(earlier: Path, output: str) -> None:
    before = rows(earlier / output)
    summary = run(earlier, output)
    assert (summary.rows, summary.computed) == (ROWS, 0)
    assert rows(earlier / output) == before
    assert main(["verify", str(earlier / output)]) == 0


def test_earlier_published_rows_suffice_for_reuse(earlier: Path) -> None:
    shutil.rmtree(earlier / "parquet" / "_glmbatch")
    source = earlier / "in" / "day=1" / "a.parquet"
    table = pq.ParquetFile(source).read()
    pq.write_table(table.take(list(reversed(range(len(table))))), source)
    assert run(earlier, "parquet").computed == 0
    assert main(["verify", str(earlier / "parquet")]) == 0


def test_answers_staged_by_an_earlier_run_are_published(earlier: Path) -> None:
    output = earlier / "refused"
    assert not (output / MANIFEST).exists()
    staged = {path.name.split(".")[1] for path in output.glob("_glmbatch/staged/*.parquet")}
    assert run(earlier, "refused", max_error_rate=0.5).computed == 0
    manifest = Ledger(output).manifest()
    assert manifest is not None
    assert {file.digest[:32] for file in manifest.files} == staged
    assert len(rows(output)) == ROWS
    assert main(["verify", str(output)]) == 0
