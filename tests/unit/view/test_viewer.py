"""A viewer over several published versions: what was said of rows stays with them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from glmbatch.errors import InputError
from glmbatch.view.query import Filters
from glmbatch.view.viewer import Viewer
from tests.stores import Store
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


def test_an_output_without_a_common_step_is_refused(folder: Path) -> None:
    step = {"kind": "classify", "name": "tone", "labels": ["calm", "angry"]}
    run({**job(folder, "other"), "steps": [step]})
    with pytest.raises(InputError, match=r"other: has no step of .*out, .* it has \['tone'\], not"):
        Viewer(str(folder / "out"), str(folder / "other"))


@pytest.mark.slow
def test_an_output_in_a_store_is_shown(
    folder: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = job(folder)
    settings["data"]["output"] = store.url("out")
    run(settings)
    monkeypatch.chdir(tmp_path)
    cache = str(tmp_path / "cache")
    viewer = Viewer(store.url("out"), cache=cache)
    output = viewer.output()
    assert (output["rows"], output["files"]) == (23, 3)
    row = viewer.row(output["version"], 0, 1)
    assert row["columns"]["day"] == "1" and row["steps"][0]["prompt"]["text"]
    assert viewer.count(Filters(step="mood", order="file", file="day=1", state="all")) == 23
    assert viewer.count(Filters(step="mood", order="file", file="cache", state="all")) == 0
    viewer.correct(output["version"], 0, 1, "mood", "bad")
    assert viewer.corrections.file == tmp_path / "out-corrections" / "corrections.parquet"
    # A run publishes other files, and one stays as it was: only what is new is fetched.
    settings["steps"] = [{**STEPS[0], "prompt_template": "How is this? {body}"}, *STEPS[1:]]
    run(settings)
    assert viewer.output()["version"] != output["version"]
    assert viewer.output()["steps"][0]["corrected"] == 1
    copies = list((tmp_path / "cache").rglob("*.parquet"))
    assert len(copies) == 3
    viewer.close()
    store.requests.clear()
    Viewer(store.url("out"), cache=cache).close()
    published = {request.key for request in store.requests if request.key.endswith(".parquet")}
    assert not {key for key in published if "/day=" in key}
    with pytest.raises(InputError, match="Set --corrections to a local folder"):
        Viewer(store.url("out"), corrections=store.url("right"), cache=cache)


@pytest.mark.slow
def test_an_empty_store_and_a_full_cache_are_one_line(folder: Path, store: Store) -> None:
    with pytest.raises(InputError, match="so nothing to look at"):
        Viewer(store.url("out"))
    settings = job(folder)
    settings["data"]["output"] = store.url("out")
    run(settings)
    (folder / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written: Not a directory. Set"):
        Viewer(store.url("out"), cache=str(folder / "file"))
