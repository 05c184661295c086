"""A model that answers the frozen rows differently publishes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glmbatch.cli.main import main
from glmbatch.errors import AuditError, InputError
from glmbatch.glm.engine.protocol import ClassifyResult
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.glm.model.network import Network
from glmbatch.report.summary import Summary
from glmbatch.run.canary import freeze
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.support import CAUSAL, Settings, Write


def run(settings: dict[str, Any]) -> Summary:
    return run_job(JobConfig.model_validate(settings))


@pytest.fixture
def frozen(
    write_source: Write, job_settings: Settings, rows: list[str | None], tmp_path: Path
) -> dict[str, Any]:
    """Settings of a job that was run once, with 6 of its rows frozen."""
    write_source("a.parquet", {"text": [*rows, None], "id": range(24)})
    run(job_settings())
    assert (
        main(["canary", str(tmp_path / "out"), str(tmp_path / "canary.parquet"), "--rows", "6"])
        == 0
    )
    return job_settings(canary__file=str(tmp_path / "canary.parquet"))


def published(tmp_path: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.suffix in {".parquet", ".json"}
    }


def test_rows_without_faults_from_all_files_are_frozen(frozen: dict[str, Any]) -> None:
    table = pq.read_table(frozen["canary"]["file"])
    assert len(table) == 6
    assert {row // 8 for row in table.column("id").to_pylist()} == {0, 1, 2}
    assert table.column("mood_error").null_count == table.column("reply_error").null_count == 6


def test_the_same_model_passes_its_canary(
    frozen: dict[str, Any], write_source: Write, rows: list[str | None]
) -> None:
    assert run(frozen).audits == ()
    write_source("a.parquet", {"text": [*rows, "new"], "id": range(24)})
    assert [(audit.step, audit.measured) for audit in run(frozen).audits] == [
        ("mood", 0.0),
        ("reply", 0.0),
    ]


def test_a_model_with_a_zeroed_layer_publishes_nothing(
    frozen: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(CAUSAL, tmp_path / "model")
    for shard in (tmp_path / "model").glob("*.bin"):
        tensors = torch.load(shard)
        torch.save(
            {
                k: v * 0 if ".layers.1.mlp" in k or ".layers.0." in k else v
                for k, v in tensors.items()
            },
            shard,
        )
    before = published(tmp_path)
    broken = {**frozen, "model": {"path": str(tmp_path / "model")}}
    for _ in range(2):  # a run that failed must not pass when repeated
        message = (
            r"nothing published: .*share of 6 canary rows that changed [\d.]+, "
            r"at most 0 allowed \(row \d.*\)"
        )
        with pytest.raises(AuditError, match=message):
            run(broken)
    after = published(tmp_path)
    assert {path: content for path, content in after.items() if "_glmbatch" not in path.parts} == {
        path: content for path, content in before.items() if "_glmbatch" not in path.parts
    }
    broken["canary"]["max_change"] = 1.0
    assert run(broken).computed == 0, "the answers were kept and are now allowed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pa.table({"text": ["x"]}), "no column"),
        (pa.table({"text": pa.array([], pa.string())}), "has 0 rows"),
        (None, "not readable as Parquet|No such file"),
    ],
)
def test_a_canary_that_does_not_match_is_refused(
    content: pa.Table | None, message: str, frozen: dict[str, Any], write_source: Write
) -> None:
    Path(frozen["canary"]["file"]).unlink()
    if content is not None:
        pq.write_table(content, frozen["canary"]["file"])
    write_source("a.parquet", {"text": ["new"], "id": [1]})
    with pytest.raises(InputError, match=message):
        run(frozen)


def test_freezing_needs_answers_and_an_outside_path(tmp_path: Path, frozen: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="so there are no answers to freeze"):
        freeze(tmp_path, tmp_path / "c.parquet", 3)
    with pytest.raises(InputError, match="is inside the output"):
        freeze(tmp_path / "out", tmp_path / "out" / "c.parquet", 3)


def test_a_run_of_retried_rows_is_checked_too(
    frozen: dict[str, Any], write_source: Write, rows: list[str | None]
) -> None:
    real = TorchEngine.classify

    def failing(engine: TorchEngine, requests: Any) -> Any:
        for result in real(engine, requests):
            yield ClassifyResult(result.index, (), "not finite") if result.index == 0 else result

    write_source("a.parquet", {"text": [*rows, "new"], "id": range(24)})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TorchEngine, "classify", failing)
        assert run({**frozen, "canary": None, "max_error_rate": 0.9}).faulty_rows == 1
    with (
        pytest.MonkeyPatch.context() as patched,
        pytest.raises(AuditError, match="canary rows that changed"),
    ):
        logits = Network.token_logits
        patched.setattr(Network, "token_logits", lambda *arguments: logits(*arguments) * -9)
        run(frozen)


def test_freezing_ignores_files_without_rows(
    frozen: dict[str, Any], write_source: Write, tmp_path: Path
) -> None:
    write_source(
        "empty.parquet", {"text": pa.array([], pa.string()), "id": pa.array([], pa.int64())}
    )
    run(frozen)
    assert freeze(tmp_path / "out", tmp_path / "more.parquet", 5) == 5


@pytest.mark.parametrize(
    ("file", "count", "line"),
    [
        ("c.parquet", "0", "--rows 0: a canary needs at least one row. Set --rows."),
        ("c.parquet", "-3", "--rows -3: a canary needs at least one row. Set --rows."),
        ("in", "1", "in: no file can be written there. Name another place."),
        (
            "in/a.parquet/c",
            "1",
            "in/a.parquet/c: no file can be written there. Name another place.",
        ),
    ],
)
def test_a_canary_that_cannot_be_is_one_line(
    frozen: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    count: str,
    line: str,
) -> None:
    out = str(tmp_path / "out")
    assert main(["canary", out, str(tmp_path / file), "--rows", count]) == 2
    printed = capsys.readouterr().err
    assert printed.endswith(f"{line}\n")
    assert printed.count("\n") == 1


def test_columns_that_differ_between_files_are_not_frozen(
    write_source: Write, job_settings: Settings, tmp_path: Path, rows: list[str]
) -> None:
    for name, other in (("a", 1), ("b", "x"), ("c", None)):
        write_source(f"{name}.parquet", {"text": rows[:2], "other": [other] * 2, "id": [1, 2]})
    twice = pa.Table.from_arrays([pa.array(rows[:1]), pa.array([3])] * 2, ["text", "id"] * 2)
    run(job_settings(steps=job_settings()["steps"][:1]))
    assert freeze(tmp_path / "out", tmp_path / "canary.parquet", 6) == 6
    columns = pq.read_schema(tmp_path / "canary.parquet").names
    assert {"text", "id"} < {*columns}
    assert "other" not in columns
    write_source("d.parquet", twice.rename_columns(["text", "id", "note", "note"]))
    run(job_settings(steps=job_settings()["steps"][:1]))
    assert freeze(tmp_path / "out", tmp_path / "canary.parquet", 6) == 6
    assert "note" not in pq.read_schema(tmp_path / "canary.parquet").names
