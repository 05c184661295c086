"""A viewer over several published versions: what was said of rows stays with them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from glmbatch.view.query import Filters
from glmbatch.view.viewer import Viewer
from tests.support import run
from tests.unit.view.conftest import STEPS, job


def test_what_was_said_stays_after_another_prompt(folder: Path) -> None:
    run(job(folder, "again"))
    viewer = Viewer(str(folder / "again"))
    version = viewer.output()["version"]
    for row, truth in ((1, "bad"), (3, "good")):
        viewer.correct(version, 0, row, "mood", truth)
    viewer.correct(version, 0, 1, "topics", ["size"])
    steps = [{**STEPS[0], "prompt_template": "How is this? {body}"}, *STEPS[1:]]
    run({**job(folder, "again"), "steps": steps})
    output = viewer.output()
    assert output["version"] != version
    assert [step["corrected"] for step in output["steps"]] == [2, 1, 0, 0]
    open_rows = viewer.page(Filters(step="mood", order="file"), 0, 30)["rows"]
    # Row 20 has the text of row 3.
    assert {(0, 1), (0, 3), (2, 4)}.isdisjoint((row["file"], row["row"]) for row in open_rows)
    assert viewer.row(output["version"], 2, 4)["steps"][0]["truth"] == "good"
    viewer.correct(output["version"], 2, 4, "mood", "so so")
    viewer.correct(output["version"], 0, 1, "mood", None)
    lines = pq.read_table(viewer.corrections.file).select(["id", "mood", "topics"]).to_pylist()
    assert lines == [
        {"id": 1, "mood": None, "topics": ["size"]},
        {"id": 3, "mood": "so so", "topics": None},
    ]
    viewer.close()


def test_truths_that_are_no_labels_any_more_are_left(folder: Path) -> None:
    run(job(folder, "again"))
    viewer = Viewer(str(folder / "again"))
    viewer.correct(viewer.output()["version"], 0, 1, "mood", "bad")
    viewer.correct(viewer.output()["version"], 0, 2, "mood", "good")
    changed = {**STEPS[0], "labels": ["good", "poor"]}
    run({**job(folder, "again"), "steps": [changed, *STEPS[1:]]})
    assert viewer.output()["steps"][0]["corrected"] == 1
    viewer.close()
