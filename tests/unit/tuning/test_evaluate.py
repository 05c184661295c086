"""Scoring a checkpoint on other labelled rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.cli.main import main
from glmbatch.evaluation.compare import compare
from glmbatch.evaluation.evaluate import evaluate
from glmbatch.evaluation.render import describe_comparison
from glmbatch.tuning.finetune import finetune
from glmbatch.tuning.report import LEARNED
from tests.support import CAUSAL, SAMPLE_MODEL, Tune, Write, run
from tests.unit.tuning.rows import GOOD, WORDS, labelled
from tests.unit.tuning.runs import trained

pytestmark = pytest.mark.slow


def test_rows_with_unknown_labels_are_scored(
    good: Tune, tmp_path: Path, write_source: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = labelled(50, seed=9)
    rows["label"][0] = "another"
    file = write_source("../other.parquet", rows)
    checkpoint = tmp_path / "tuned" / "current" / "checkpoint"
    assert main(["evaluate", str(checkpoint), str(file), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["rows"] == 50 and scores["accuracy"] > 0.85
    assert scores["labels"]["another"]["recall"] == 0
    assert scores["learned"] == 0


def test_rows_that_a_checkpoint_learned_are_counted(
    good: Tune,
    good_run: Path,
    tmp_path: Path,
    write_source: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By `evaluate`, by `compare`, and by a job that measures a changed step first."""
    report = finetune(good(**GOOD))
    used = report.audit.parts["train"] + report.audit.parts["valid"]
    checkpoint = tmp_path / "tuned" / "current" / "checkpoint"
    command = ["evaluate", str(checkpoint), str(good_run / "in"), "--keep", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learned"] == used == 192
    assert main(command) == 0
    warning = "192 of 240 rows are among those the checkpoint was trained on: the numbers are too"
    assert warning in capsys.readouterr().out

    # A job has another name for the text, and asks other models too.
    rows = pq.read_table(good_run / "in" / "day=0" / "a.parquet").rename_columns(["body", "mood"])
    file = write_source("../rows.parquet", pa.concat_tables([rows, rows.slice(0, 9)]))
    write_source("night.parquet", {"body": ["great food"]})
    job: dict[str, Any] = {
        "data": {"input": str(tmp_path / "in"), "output": str(tmp_path / "out")},
        "model": str(checkpoint),
        "steps": [{"kind": "classify", "name": "mood"}],
        "evaluate": str(file),
    }
    job["data"]["text_column"] = "body"
    (step,) = evaluate(job, str(file), keep=tmp_path).steps
    assert 80 < step.learned < step.counts.scored == 129
    (measured,) = run(job).measured
    assert measured.learned == step.learned
    assert f"{step.learned} of 129 rows are among those" in str(measured)
    other = {**job, "model": str(SAMPLE_MODEL)}
    other["steps"] = [{**job["steps"][0], "labels": [*WORDS]}]
    compared = compare(job, other, str(file), keep=tmp_path)
    assert compared.steps[0].learned == (step.learned, 0)
    assert f"A learned        {step.learned} of 129 rows are" in describe_comparison(compared)

    # What is trained further also knows what its base learned.
    further = good(data__seed=1, training__epochs=1, model=str(checkpoint))
    own = np.load(trained(further) / LEARNED)
    base = np.load(checkpoint.parent / LEARNED)
    assert len(base) == 192 < len(own) and np.isin(base, own).all()


def test_a_checkpoint_without_a_head_is_refused(
    write_source: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_source("rows.parquet", labelled(9))
    assert main(["evaluate", str(CAUSAL), str(file)]) == 2
    assert "has no trained head" in capsys.readouterr().err
