"""Which rows the viewer shows, and in which order: compared with all rows in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import InputError
from glmbatch.ledger.manifest import read_manifest, write_manifest
from glmbatch.view.published import RowsChanged, read_published
from glmbatch.view.query import Filters
from glmbatch.view.rows import DEEPEST, Place, Rows
from glmbatch.view.spread import LOT
from tests.support import rows_of

Open = Callable[..., Rows]


@pytest.fixture
def rows_in(folder: Path) -> Iterator[Open]:
    opened = []

    def open_rows(beside: str | None = None, output: str = "out") -> Rows:
        other = read_published(str(folder / beside)) if beside else None
        opened.append(Rows(read_published(str(folder / output)), "body", other))
        return opened[-1]

    yield open_rows
    for rows in opened:
        rows.close()


def ids(rows: Rows, **filters: Any) -> list[int]:
    """The values of `id` in the rows of one page."""
    asked = Filters.model_validate({"step": "mood", "order": "unsure", **filters})
    places = rows.page(asked, [], 0, 100)
    # A page is what it says it is, and the count counts it.
    if asked.order == "file":
        assert rows.count(asked, []) == len(places)
    return [rows.published.row(place.file, place.row).column("id")[0].as_py() for place in places]


def test_the_least_sure_rows_come_first(rows_in: Open, folder: Path) -> None:
    answers = [row for row in rows_of(folder / "out") if row["mood_margin"] is not None]
    answers.sort(key=lambda row: row["mood_margin"])
    # Rows 3 and 20 have the same text: one question, shown once.
    expected = dict.fromkeys(row["id"] % 17 if row["id"] == 20 else row["id"] for row in answers)
    shown = ids(rows_in(), error="none")
    assert [number % 17 if number == 20 else number for number in shown] == list(expected)


@pytest.mark.parametrize(
    ("filters", "meets"),
    [
        ({"label": "bad"}, lambda row: row["mood"] == "bad"),
        ({"error": "any"}, lambda row: row["mood_error"] is not None),
        ({"error": "null_value"}, lambda row: row["mood_error_type"] == "null_value"),
        ({"least": 0.34, "most": 0.5}, lambda row: 0.34 <= (row["mood_score"] or 0) <= 0.5),
        ({"text": "NUMBER 7"}, lambda row: "number 7" in (row["body"] or "")),
        ({"file": "-0000000008"}, lambda row: 8 <= row["id"] < 16),
        ({"step": "topics", "label": "size"}, lambda row: "size" in (row["topics"] or [])),
        (
            {"step": "reply", "text": "e"},
            lambda row: "e" in f"{row['body'] or ''}{row['reply'] or ''}".lower(),
        ),
    ],
)
def test_filters_choose_rows(
    rows_in: Open, folder: Path, filters: dict[str, Any], meets: Callable[[Any], bool]
) -> None:
    expected = [row["id"] for row in rows_of(folder / "out") if meets(row)]
    assert sorted(ids(rows_in(), order="file", **filters)) == expected


@pytest.mark.parametrize("step", ["mood", "topics", "facts", "reply"])
@pytest.mark.parametrize("order", ["worth", "unsure", "differs", "grown", "random"])
def test_every_order_shows_every_question_once(rows_in: Open, step: str, order: str) -> None:
    rows = rows_in()
    places = rows.page(Filters(step=step, order=order), [], 0, 100)  # type: ignore[arg-type]
    keys = [place.key for place in places if place.key is not None]
    assert len(keys) == len(set(keys))
    assert len(places) == len(set(places))
    assert len(rows.lines(Filters(step=step), places)) == len(places)
    # A row without a text has no key; of the other rows two ask the same, but for the reply.
    assert len(places) == (23 if step == "reply" else 22)


def test_pages_are_parts_of_one_order(rows_in: Open) -> None:
    rows = rows_in()
    whole = rows.page(Filters(step="mood"), [], 0, 22)
    parts: list[Place] = []
    for start in range(0, 22, 5):
        parts += rows.page(Filters(step="mood"), [], start, 5)
    assert parts == whole


def test_every_tenth_row_is_drawn_by_lot(rows_in: Open) -> None:
    rows = rows_in()
    drawn = rows.page(Filters(step="mood", order="random"), [], 0, 22)
    unsure = rows.page(Filters(step="mood", order="unsure"), [], 0, 1)
    worth = rows.page(Filters(step="mood"), [], 0, LOT)
    assert worth[0] == unsure[0]
    assert worth[LOT - 1] == next(place for place in drawn if place not in worth[: LOT - 1])
    assert drawn[-1].key is None  # nothing to correct


def test_rows_like_those_looked_at_come_later(rows_in: Open) -> None:
    rows = rows_in()
    asked = Filters(step="mood")
    first, *others = rows.page(asked, [], 0, 22)
    (line,) = rows.lines(asked, [first])
    later = rows.page(asked, [], 0, 22, known=[line["text"]])
    # Apart from numbers and repeated words, the texts are of four kinds.
    assert later.index(first) >= 3
    assert set(later) == {first, *others}
    rows.text_column = None  # nothing to compare
    unsure = rows.page(Filters(step="mood", order="unsure"), [], 0, 9)
    assert rows.page(asked, [], 0, 9, known=["any"]) == unsure


def test_labels_that_have_grown_come_first(rows_in: Open, folder: Path) -> None:
    others = dict.fromkeys(range(9), "good") | dict.fromkeys(range(9, 14), "so so")
    copy_with(folder / "out", folder / "other", {"mood": others})
    rows = rows_in(output="other")
    mood = rows.published.steps[0]
    grown = replace(mood, grown={"bad": 0.2, "so so": 0.1})
    rows.published = replace(rows.published, steps=(grown, *rows.published.steps[1:]))
    labels = {row["id"]: row["mood"] for row in rows_of(folder / "other")}
    shown = [labels[number] for number in ids(rows, order="grown", error="none")]
    assert len(set(shown)) == 3
    ranks = [{"bad": 0, "so so": 0, "good": 1}[label] for label in shown]
    assert ranks == sorted(ranks)


def test_rows_on_which_outputs_differ_come_first(rows_in: Open, folder: Path) -> None:
    other = folder / "other"
    copy_with(folder / "out", other, {"mood": {5: "bad", 12: "good"}})
    rows = rows_in("other")
    before = {row["id"]: row["mood"] for row in rows_of(folder / "out")}
    differing = {
        number for number, label in {5: "bad", 12: "good"}.items() if before[number] != label
    }
    assert differing
    assert set(ids(rows, differs=True)) == differing
    assert set(ids(rows, order="worth")[: len(differing)]) == differing
    place = rows.page(Filters(step="mood", differs=True), [], 0, 1)[0]
    assert rows.other_place(place.file, place.row) == (place.file, place.row)


def copy_with(source: Path, target: Path, changes: dict[str, dict[int, str]]) -> None:
    shutil.copytree(source, target)
    for path in target.glob("day=1/*.parquet"):
        table = pq.read_table(path, partitioning=None)
        for name, by_id in changes.items():
            values = table.column(name).to_pylist()
            for row, number in enumerate(table.column("id").to_pylist()):
                values[row] = by_id.get(number, values[row])
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values))
        pq.write_table(table, path)


def test_changed_sources_are_not_compared(rows_in: Open, folder: Path) -> None:
    copy_with(folder / "out", folder / "other", {"mood": {5: "bad", 12: "good"}})
    manifest = read_manifest(folder / "other")
    assert manifest is not None
    files = tuple(replace(file, source_digest="another") for file in manifest.files)
    write_manifest(folder / "other", manifest.model_copy(update={"files": files}))
    rows = rows_in("other")
    assert ids(rows, differs=True) == []
    assert rows.other_place(0, 0) is None


def test_what_was_looked_at_is_left_out(rows_in: Open) -> None:
    rows = rows_in()
    places = rows.page(Filters(step="mood", order="file"), [], 0, 3)
    keys = [place.key for place in places if place.key is not None]
    assert len(keys) == 3
    # Row 20 asks the same as row 3, which is not among them.
    assert rows.count(Filters(step="mood"), keys) == 20
    assert rows.count(Filters(step="mood", state="corrected"), keys) == 3
    assert rows.count(Filters(step="mood", state="all"), keys) == 23


def test_counts_by_label_and_error(rows_in: Open, folder: Path) -> None:
    rows = rows_in()
    facets = rows.facets(rows.published.step("mood"))
    assert sum(facets["labels"].values()) == 22
    assert facets["errors"] == {"null_value": 1}
    assert set(rows.facets(rows.published.step("topics"))["labels"]) <= {"price", "size"}


def test_wrong_questions_are_refused(rows_in: Open) -> None:
    rows = rows_in()
    with pytest.raises(InputError, match="first 10,000 rows"):
        rows.page(Filters(step="mood"), [], DEEPEST, 1)
    with pytest.raises(InputError, match="no step 'moon'"):
        rows.page(Filters(step="moon"), [], 0, 1)
    with pytest.raises(InputError, match="no second output"):
        rows.page(Filters(step="mood", differs=True), [], 0, 1)
    with pytest.raises(InputError, match="no row 99"):
        rows.published.row(0, 99)


def test_a_published_file_that_is_gone_is_no_crash(rows_in: Open, folder: Path) -> None:
    rows = rows_in()
    for path in folder.glob("out/day=1/*.parquet"):
        path.unlink()
    with pytest.raises(RowsChanged):
        rows.page(Filters(step="mood"), [], 0, 1)
    with pytest.raises(RowsChanged):
        rows.published.row(0, 0)


def test_an_output_without_answers_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="that lists files, so nothing"):
        read_published(str(folder / "in"))


def test_growth_comes_from_the_report_of_the_run(folder: Path) -> None:
    manifest = read_manifest(folder / "out")
    assert manifest is not None
    assert not read_published(str(folder / "out")).steps[0].grown
    path = folder / "out" / "_glmbatch" / "reports" / f"{manifest.run}.json"
    report = json.loads(path.read_text())
    (mood,) = (step for step in report["summary"]["steps"] if step["name"] == "mood")
    report["labels_before"] = {"mood": {"never": 10}}
    path.write_text(json.dumps(report))
    grown = read_published(str(folder / "out")).steps[0].grown
    total = sum(mood["labels"].values())
    assert grown == {label: rows / total for label, rows in mood["labels"].items() if rows}
