"""A calibration adds columns to published answers, and asks no row again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import glmbatch
from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.ledger.repair import repair
from glmbatch.ledger.verification import verify
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from glmbatch.steps.calibration import read_calibration
from tests.support import CLASSIFY, Settings, Write, rows_of, run

pytestmark = pytest.mark.slow

ROWS = 104
STEPS = [
    CLASSIFY,
    {
        "kind": "classify",
        "name": "topics",
        "labels": ["price", "delivery"],
        "multiple": True,
        "when": "number != 3",
    },
    {"kind": "generate", "name": "reply", "max_tokens": 2, "confidence": True},
    {
        "kind": "extract",
        "name": "facts",
        "fields": {
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
            "tone": {"choices": ["warm", "cold"]},
        },
        "max_tokens": 8,
        "abstain_below": 0.001,
    },
]
Calibrate = Callable[..., str]


@pytest.fixture
def table() -> pa.Table:
    texts = [f"text number {number}" for number in range(ROWS)]
    return pa.table({"number": range(ROWS), "text": texts})


@pytest.fixture
def settings(job_settings: Settings, write_source: Write, table: pa.Table) -> dict[str, Any]:
    write_source("a.parquet", table)
    settings = job_settings(steps=STEPS, data__rows_per_fragment=60)
    run(settings)
    return settings


@pytest.fixture
def calibrate(settings: dict[str, Any], table: pa.Table, out: Path, tmp_path: Path) -> Calibrate:
    """Fit a calibration to answers of which every n-th is wrong; return its file."""

    def fit(nth: int, **changes: Any) -> str:
        rows = rows_of(out)
        labelled = table
        wrong = {"mood": "so so", "topics": ["price"], "reply": "other"}
        wrong |= {"facts_stars": 9, "facts_tone": "cold"}
        for name, other in wrong.items():
            values = [row[name] if place % nth else other for place, row in enumerate(rows)]
            labelled = labelled.append_column(name, pa.array(values))
        pq.write_table(labelled, tmp_path / "labelled.parquet")
        file = str(tmp_path / f"calibration{nth}.json")
        found = glmbatch.evaluate(
            {**settings, **changes},
            str(tmp_path / "labelled.parquet"),
            keep=tmp_path / "kept",
            calibrate=file,
        )
        assert found.calibrated == file
        return file

    return fit


def test_calibrated_columns_ask_nothing(
    settings: dict[str, Any], calibrate: Calibrate, out: Path
) -> None:
    before = rows_of(out)
    file = calibrate(4)
    settings["calibration"] = file
    assert [step.to_run for step in preview(JobConfig.model_validate(settings)).steps] == [0] * 4
    assert run(settings).computed == 0
    after = rows_of(out)
    assert not verify(str(out)).findings
    steps = read_calibration(file).steps
    assert {name: list(step.maps) for name, step in steps.items()} == {
        "mood": ["mood"],
        "topics": ["price", "delivery"],
        "reply": ["reply"],
        "facts": ["stars", "tone"],
    }
    added = ["mood_calibrated", "topics_calibrated", "reply_calibrated"]
    added += ["facts_stars_calibrated", "facts_tone_calibrated"]
    for row, raw in zip(after, before, strict=True):
        assert {name: value for name, value in row.items() if name not in added} == raw
        likely = np.exp(np.array([row["reply_mean_log_prob"]]))
        expected = [
            (row["mood_calibrated"], "mood", "mood", [row["mood_score"]]),
            (row["reply_calibrated"], "reply", "reply", likely),
            (row["facts_tone_calibrated"], "facts", "tone", [row["facts_tone_score"]]),
        ]
        for label, score in (row["topics_scores"] or {}).items():
            expected.append((row["topics_calibrated"][label], "topics", label, [score]))
        for given, step, part, score in expected:
            chance = steps[step].maps[part].map.chances(np.array(score))
            assert given == pytest.approx(chance[0])
    assert after[3]["topics_calibrated"] is None  # it was not asked
    mean = np.mean([row["mood_calibrated"] for row in after])
    assert mean == pytest.approx(0.75, abs=0.06)
    assert run(settings).unchanged_sources == 1


def test_another_calibration_rewrites_the_outputs(
    settings: dict[str, Any], calibrate: Calibrate, out: Path
) -> None:
    raw = rows_of(out)
    settings["calibration"] = calibrate(4)
    run(settings)
    first = rows_of(out)
    # Formatting, and what was measured, is not what it does.
    content = json.loads(Path(settings["calibration"]).read_text())
    content["steps"]["mood"]["maps"]["mood"]["ece_after"] = 0.5
    Path(settings["calibration"]).write_text(json.dumps(content))
    assert run(settings).unchanged_sources == 1
    settings["calibration"] = calibrate(2)
    summary = run(settings)
    assert (summary.computed, summary.unchanged_sources) == (0, 0)
    second = rows_of(out)
    assert np.mean([row["mood_calibrated"] for row in second]) < 0.6
    assert [row["mood_score"] for row in second] == [row["mood_score"] for row in first]
    # A lost manifest is rebuilt with it, and a table in memory has the columns too.
    (out / MANIFEST).unlink()
    (out / "_glmbatch" / "manifest.json").unlink()
    repair(str(out))
    assert not verify(str(out)).findings
    manifest = Ledger(str(out)).manifest()
    assert manifest is not None and all(file.calibration for file in manifest.files)
    frame = pa.table({"number": [5], "text": ["text number 5"]})
    (answered,) = glmbatch.annotate_table(frame, settings).to_pylist()
    assert answered["mood_calibrated"] == pytest.approx(second[5]["mood_calibrated"], abs=1e-6)
    settings["calibration"] = None
    assert run(settings).computed == 0
    assert rows_of(out) == raw


def test_a_calibration_of_other_settings_is_refused(
    settings: dict[str, Any], calibrate: Calibrate, out: Path, tmp_path: Path
) -> None:
    file = calibrate(4)
    steps = [{**STEPS[0], "prompt_template": "Mood of {text}?"}, *STEPS[1:]]
    for changed in (steps, [{**STEPS[0], "labels": ["good", "bad"]}, *STEPS[1:]]):
        with pytest.raises(InputError, match="another prompt, model or labels than step 'mood'"):
            run({**settings, "calibration": file, "steps": changed})
    with pytest.raises(InputError, match="fitted for a step 'facts', and the job has"):
        run({**settings, "calibration": file, "steps": STEPS[:3]})
    # A threshold changes no confidence; answers below it have none.
    unsure = {**CLASSIFY, "abstain_below": 1}
    assert run({**settings, "calibration": file, "steps": [unsure, *STEPS[1:]]}).computed == ROWS
    assert [row["mood_calibrated"] for row in rows_of(out)] == [None] * ROWS
    for content, message in (("{}", "steps: Field required"), ("no", "is no calibration")):
        Path(file).write_text(content)
        with pytest.raises(InputError, match=message):
            run({**settings, "calibration": file})
    with pytest.raises(InputError, match="there is no such file"):
        run({**settings, "calibration": str(tmp_path / "nowhere.json")})
    with pytest.raises(InputError, match="both write a column 'mood_calibrated'"):
        both = [CLASSIFY, {**CLASSIFY, "name": "mood_calibrated"}]
        glmbatch.annotate({**settings, "calibration": file, "steps": both})


def test_files_that_cannot_be_calibrated_again_are_not_mixed(
    settings: dict[str, Any], calibrate: Calibrate, write_source: Write
) -> None:
    file = calibrate(4)
    write_source("a.parquet", {"number": [1], "text": ["new"]}).rename(
        Path(settings["data"]["input"]) / "b.parquet"
    )
    with pytest.raises(InputError, match="was calibrated otherwise, and this run cannot replace"):
        run({**settings, "calibration": file})


def test_a_table_of_delta_lake_takes_the_columns(
    settings: dict[str, Any], calibrate: Calibrate, tmp_path: Path
) -> None:
    deltalake = pytest.importorskip("deltalake")
    data = {**settings["data"], "output": str(tmp_path / "table"), "format": "delta"}
    assert run({**settings, "data": data}).computed == 4 * ROWS - 1
    file = calibrate(4)
    assert run({**settings, "data": data, "calibration": file}).computed == 0
    rows = deltalake.DeltaTable(data["output"]).to_pyarrow_table().to_pylist()
    assert all(row["mood_calibrated"] is not None for row in rows)
    assert not verify(data["output"]).findings


def test_few_rows_are_refused_in_one_line(
    settings: dict[str, Any], table: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table.slice(0, 40).append_column("mood", pa.array(["good"] * 40))
    pq.write_table(rows, tmp_path / "few.parquet")
    job, file = tmp_path / "job.yaml", tmp_path / "calibration.json"
    job.write_text(yaml.safe_dump({**settings, "steps": STEPS[:1]}))
    command = ["evaluate", str(job), str(tmp_path / "few.parquet"), "--keep", str(tmp_path / "k")]
    assert main([*command, "--calibrate", str(file)]) == 2
    error = capsys.readouterr().err
    assert "mood has 40; 100 different texts" in error and error.count("\n") == 1
    assert not file.exists()
    for place in (tmp_path, job / "x.json"):  # a folder, and below a file
        assert main([*command, "--calibrate", str(place)]) == 2
        assert capsys.readouterr().err == (
            f"glmbatch: --calibrate {place}: no file can be written there. Name another place.\n"
        )
