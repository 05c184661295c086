"""The fine-tuning flow on a real Prefect server: states, artifact and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.flows.commands import last_flow_run, query, run
from tests.support import Tune, Write
from tests.unit.tuning.rows import labelled

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


def test_the_flow_trains_scores_and_promotes(
    prefect_server: dict[str, str],
    tune: Tune,
    tmp_path: Path,
) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text(yaml.safe_dump(tune(training__epochs=6).model_dump(mode="json")))
    done = run(prefect_server, "-m", "glmbatch.cli.main", "train", str(file), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["promoted"] and report["scores"]["accuracy"] > 0.8
    flow = last_flow_run(prefect_server)
    assert (flow["name"].split()[0], flow["state_name"]) == ("finetune", "Completed")
    tasks = query(prefect_server, "task_runs", {"flow_runs": {"id": {"any_": [flow["id"]]}}})
    kinds = {task["name"].split("-")[0].split()[0] for task in tasks}
    assert kinds == {"begin", "train", "evaluate", "promote"}
    cards = query(prefect_server, "artifacts", {"artifacts": {"key": {"any_": ["finetune"]}}})
    assert any(report["run"] in card["data"] for card in cards)
    again = run(prefect_server, "-m", "glmbatch.cli.main", "train", str(file), "--json")
    assert json.loads(again.stdout) == report, "a finished run is found, not repeated"


def test_untrainable_rows_give_one_line_and_no_flow(
    prefect_server: dict[str, str],
    tune: Tune,
    tmp_path: Path,
    write_source: Write,
) -> None:
    rows = labelled(30)
    write_source("day=0/a.parquet", {**rows, "label": ["same"] * 30})
    write_source("day=1/a.parquet", {**rows, "label": ["same"] * 30})
    file = tmp_path / "tune.yaml"
    file.write_text(yaml.safe_dump(tune().model_dump(mode="json")))
    done = run(prefect_server, "-m", "glmbatch.cli.main", "train", str(file))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "all rows have the label 'same'" in done.stderr
