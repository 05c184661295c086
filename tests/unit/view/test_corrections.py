"""Corrections are labelled rows that training reads, and a kill loses none of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import InputError
from glmbatch.settings.tuning import LabelledData
from glmbatch.tuning.examples import read_examples
from glmbatch.view.corrections import Corrections, corrections_folder
from glmbatch.view.published import Published, read_published
from tests.unit.view.conftest import TEXTS

Keep = Callable[..., None]


@pytest.fixture
def published(folder: Path) -> Published:
    return read_published(str(folder / "out"))


@pytest.fixture
def corrections(folder: Path) -> Corrections:
    return Corrections(corrections_folder(folder / "out", None))


@pytest.fixture
def keep(published: Published, corrections: Corrections) -> Keep:
    def keep_one(row: int, step: str, truth: object) -> None:
        corrections.keep(published, row // 8, row % 8, published.step(step), truth)

    return keep_one


def rows_in(corrections: Corrections) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(corrections.file).to_pylist()
    return rows


def test_training_reads_corrections_as_they_are(
    keep: Keep, corrections: Corrections, folder: Path
) -> None:
    keep(3, "mood", "bad")
    keep(7, "mood", "so so")
    keep(9, "reply", "Thank you.")
    moods = LabelledData(
        input=str(folder / "out-corrections"), text_column="body", label_column="mood"
    )
    read = read_examples(moods)
    assert [(each.text, each.label) for each in read.examples] == [
        (TEXTS[3], "bad"),
        (TEXTS[7], "so so"),
    ]
    replies = moods.model_copy(update={"response_column": "reply"})
    assert [each.label for each in read_examples(replies).examples] == ["Thank you."]


def test_a_row_has_all_its_columns_and_keys(
    keep: Keep, corrections: Corrections, published: Published
) -> None:
    keep(10, "topics", ["size"])
    (row,) = rows_in(corrections)
    answered = published.row(1, 2).to_pylist()[0]
    keys = {f"{step.name}_key": answered[f"{step.name}_key"] for step in published.steps}
    own = {"note": "x", "body": TEXTS[10], "id": 10, "day": "1"}
    truths = {"mood": None, "topics": ["size"], "facts": None, "reply": None}
    assert row == {**own, **truths, **keys}


def test_steps_of_one_row_share_a_row(keep: Keep, corrections: Corrections) -> None:
    keep(1, "mood", "bad")
    keep(1, "facts", '{"tone": "calm"}')
    (row,) = rows_in(corrections)
    assert (row["mood"], row["facts"]) == ("bad", '{"tone": "calm"}')


def test_rows_of_one_question_have_one_truth(
    keep: Keep, corrections: Corrections, published: Published
) -> None:
    keep(3, "mood", "bad")
    keep(20, "mood", "good")  # the same text
    (row,) = rows_in(corrections)
    assert row["mood"] == "good"
    assert list(corrections.of(published.step("mood")).values()) == ["good"]


def test_a_correction_can_be_withdrawn(keep: Keep, corrections: Corrections) -> None:
    keep(1, "mood", "bad")
    keep(2, "mood", "bad")
    keep(2, "reply", "Hello.")
    keep(1, "mood", None)
    keep(2, "mood", None)
    keep(4, "mood", None)  # never corrected
    (row,) = rows_in(corrections)
    assert (row["id"], row["mood"], row["reply"]) == (2, None, "Hello.")


def test_truths_of_earlier_steps_and_columns_stay(
    keep: Keep, corrections: Corrections, published: Published
) -> None:
    corrections.file.parent.mkdir()
    older = {"body": ["x"], "stars": [1], "tone": ["calm"], "tone_key": [b"1" * 16]}
    pq.write_table(pa.table(older), corrections.file)
    keep(1, "mood", "bad")
    keep(1, "mood", None)
    (row,) = rows_in(corrections)
    assert (row["body"], row["tone"], row["stars"]) == ("x", "calm", 1)


def test_columns_that_do_not_fit_are_refused(keep: Keep, corrections: Corrections) -> None:
    corrections.file.parent.mkdir()
    pq.write_table(pa.table({"id": ["text"], "mood": ["bad"]}), corrections.file)
    with pytest.raises(InputError, match="Set --corrections"):
        keep(1, "mood", "bad")


@pytest.mark.parametrize(
    ("step", "truth"),
    [
        ("mood", "great"),
        ("mood", ["bad"]),
        ("topics", "size"),
        ("topics", ["weight"]),
        ("reply", 1),
        ("facts", "calm"),
        ("facts", "[]"),
        ("facts", '{"tones": "calm"}'),
        ("facts", "{}"),
        ("facts", '{"tone": "ugly"}'),
        ("facts", '{"tone": ["calm"]}'),
        ("facts", '{"what": 5}'),
    ],
)
def test_what_is_no_answer_is_refused(
    keep: Keep, corrections: Corrections, step: str, truth: object
) -> None:
    with pytest.raises(InputError):
        keep(1, step, truth)
    assert not corrections.file.exists()


def test_a_row_that_was_not_asked_is_refused(keep: Keep) -> None:
    with pytest.raises(InputError, match="was not asked of mood"):
        keep(21, "mood", "bad")


def test_a_kill_leaves_what_was_there(
    keep: Keep, corrections: Corrections, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(1, "mood", "bad")
    before = corrections.file.read_bytes()

    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            keep(2, "mood", "bad")
    assert corrections.file.read_bytes() == before
    keep(2, "mood", "so so")
    assert [row["mood"] for row in rows_in(corrections)] == ["bad", "so so"]


def test_two_viewers_see_each_other(
    keep: Keep, corrections: Corrections, published: Published, folder: Path
) -> None:
    keep(1, "mood", "bad")
    other = Corrections(corrections.file.parent)
    other.keep(published, 0, 2, published.step("mood"), "good")
    keep(4, "mood", "so so")
    assert [row["mood"] for row in rows_in(corrections)] == ["bad", "good", "so so"]


def test_corrections_are_as_private_as_the_answers(
    keep: Keep, corrections: Corrections, published: Published
) -> None:
    published.path_of(0).chmod(0o600)
    keep(1, "mood", "bad")
    keep(9, "mood", "bad")
    assert corrections.file.stat().st_mode & 0o777 == 0o600


def test_a_folder_inside_the_output_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="is inside the output"):
        corrections_folder(folder / "out", str(folder / "out" / "right"))
    (folder / "job.yaml").write_text("")
    with pytest.raises(InputError, match=r"job\.yaml: is a file, or you may not write there\. Set"):
        corrections_folder(folder / "out", str(folder / "job.yaml"))
