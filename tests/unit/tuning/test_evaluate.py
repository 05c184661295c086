"""Scoring a checkpoint on other labelled rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmbatch.cli.main import main
from glmbatch.tuning.finetune import finetune
from tests.support import CAUSAL, Tune, Write
from tests.unit.tuning.rows import labelled

pytestmark = pytest.mark.slow


def test_rows_with_unknown_labels_are_scored(
    tune: Tune, tmp_path: Path, write_source: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tune(training__epochs=6))
    rows = labelled(50, seed=9)
    rows["label"][0] = "another"
    file = write_source("../other.parquet", rows)
    checkpoint = tmp_path / "tuned" / "current" / "checkpoint"
    assert main(["evaluate", str(checkpoint), str(file), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["rows"] == 50 and scores["accuracy"] > 0.85
    assert scores["labels"]["another"]["recall"] == 0


def test_a_checkpoint_without_a_head_is_refused(
    write_source: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_source("rows.parquet", labelled(9))
    assert main(["evaluate", str(CAUSAL), str(file)]) == 2
    assert "has no trained head" in capsys.readouterr().err
