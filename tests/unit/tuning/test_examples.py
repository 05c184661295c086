"""Which labelled rows and columns can be read."""

from __future__ import annotations

import re
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from glmbatch.errors import InputError
from glmbatch.evaluation.truth import read_labelled_rows
from glmbatch.settings.tuning import LabelledData
from glmbatch.tuning.examples import Example, read_examples, text_keys
from glmbatch.tuning.split import PARTS, read_labelled
from tests.support import Write
from tests.unit.tuning.rows import labelled


def test_rows_without_a_text_or_a_label_are_counted(tmp_path: Path, write_source: Write) -> None:
    texts = ["fine", None, " ", "no label", "a blank one"]
    write_source("a.parquet", {"text": texts, "label": [" good ", "bad", "good", None, "\t"]})
    rows = read_examples(LabelledData(input=str(tmp_path / "in")))
    assert rows.examples == [Example("a.parquet row 0", "fine", "good")]
    assert rows.skipped == {"text": 2, "label": 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", "labelled rows must be Parquet, not CSV or JSON lines. Convert the file."),
        ("b.JSONL.gz", "labelled rows must be Parquet, not CSV or JSON lines. Convert the file."),
        ("x.txt", "is not Parquet, and the ending .txt is not read; labelled rows must be Parquet"),
        ("notes.txt", "is not Parquet, and the ending .txt is not read; labelled rows must be"),
    ],
)
def test_labelled_rows_must_be_parquet(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("hi\n" if name == "x.txt" else "text,label\nfine,good\n")
    with pytest.raises(InputError, match=re.escape(f"{name}: {message}")):
        read_examples(LabelledData(input=str(tmp_path / name)))
    with pytest.raises(InputError, match=re.escape(f"{name}: {message}")):
        read_labelled_rows(str(tmp_path / name), ["text", "label"])


def test_parquet_under_another_ending_is_read(tmp_path: Path, write_source: Write) -> None:
    write_source("a.parquet", {"text": ["fine"], "label": ["good"]}).rename(tmp_path / "a.data")
    assert len(read_examples(LabelledData(input=str(tmp_path / "a.data"))).examples) == 1


def test_an_answer_keeps_its_spaces(tmp_path: Path, write_source: Write) -> None:
    write_source("a.parquet", {"text": ["question"], "reply": [" answer\n"]})
    data = LabelledData(input=str(tmp_path / "in"), response_column="reply")
    assert read_examples(data).examples[0].label == " answer\n"


def test_a_partition_folder_is_a_column(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(60)
    for label in ("good", "bad", "so so"):
        texts = []
        for text, name in zip(rows["text"], rows["label"], strict=True):
            if name == label:
                texts.append(text)
        folder = f"mood={label.replace(' ', '%20')}/a.parquet"
        write_source(f"part=train/{folder}", {"text": texts})
        write_source(f"part=valid/{folder}", {"text": [f"{label} {label}"]})
        write_source(f"part=test/{folder}", {"text": [f"{label}!"]})
    given = {"label_column": "mood", "split_column": "part"}
    result = read_labelled(LabelledData(input=str(tmp_path / "in"), **given))
    assert result.labels == ("bad", "good", "so so")
    assert [len(result.parts[name]) for name in PARTS] == [60, 3, 3]


def test_a_missing_column_is_named_with_the_others(tmp_path: Path, write_source: Write) -> None:
    write_source("mood=good/a.parquet", {"text": ["fine"]})
    with pytest.raises(InputError, match=r"no column 'label'; it has \['text', 'mood'\]"):
        read_examples(LabelledData(input=str(tmp_path / "in")))


def test_whole_numbers_can_be_labels(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(60)
    numbers = [sorted(set(rows["label"])).index(label) for label in rows["label"]]
    write_source("a.parquet", {**rows, "stars": numbers})
    data = LabelledData(input=str(tmp_path / "in"), label_column="stars")
    assert read_labelled(data).labels == ("0", "1", "2")


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (pa.array([0.0, None, 2.0, -1.0]), ["0", None, "2", "-1"]),
        (pa.array([0.0, float("nan"), -0.0]), ["0", None, "0"]),
        (pa.array([1, 2], pa.float16()), ["1", "2"]),
        (pa.array([1, None], pa.float32()), ["1", None]),
        (pa.array([2.0**53]), ["9007199254740992"]),
        (pa.array([Decimal("1.00"), None], pa.decimal128(5, 2)), ["1", None]),
        (pa.array([Decimal(7)], pa.decimal256(40, 0)), ["7"]),
        (pa.array([3, 4], pa.uint8()), ["3", "4"]),
        (pa.array([True, None]), ["True", None]),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([1, None]).dictionary_encode(), ["1", None]),
        (pa.array([1.0, None]).dictionary_encode(), ["1", None]),
        (pa.array(["a"], pa.large_string()), ["a"]),
        (pa.array([b"a"]), ["a"]),
    ],
    ids=lambda values: str(getattr(values, "type", "")),
)
def test_labels_of_any_integer_type_are_read(
    tmp_path: Path, write_source: Write, values: pa.Array, labels: list[str | None]
) -> None:
    texts = [f"text {row}" for row in range(len(values))]
    write_source("a.parquet", pa.table({"text": texts, "label": values}))
    rows = read_examples(LabelledData(input=str(tmp_path / "in")))
    assert [example.label for example in rows.examples] == [x for x in labels if x is not None]
    assert rows.skipped.get("label", 0) == labels.count(None)


def test_a_null_in_one_file_does_not_change_labels(tmp_path: Path, write_source: Write) -> None:
    write_source("a.parquet", {"text": ["a", "b"], "label": [0, 1]})
    write_source("b.parquet", {"text": ["c", "d"], "label": [1.0, None]})
    write_source("c.parquet", {"text": ["e"], "label": pa.nulls(1)})
    rows = read_examples(LabelledData(input=str(tmp_path / "in")))
    assert [example.label for example in rows.examples] == ["0", "1", "1"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([0.5]),
        pa.array([1.0, float("inf")]),
        pa.array([1e30]),
        pa.array([Decimal("1.5")], pa.decimal128(5, 2)),
        pa.array([1.5]).dictionary_encode(),
        pa.array([date(2024, 1, 1)]),
        pa.array([[0.5]]),
        pa.array([[[1]]]),
    ],
    ids=lambda values: str(values.type),
)
def test_other_values_cannot_be_labels(
    tmp_path: Path, write_source: Write, values: pa.Array
) -> None:
    texts = [f"text {row}" for row in range(len(values))]
    write_source("a.parquet", pa.table({"text": texts, "sure": values}))
    data = LabelledData(input=str(tmp_path / "in"), label_column="sure")
    match = r"column 'sure' has type .* (not text|numbers are not whole).*Cast it .*label_column"
    with pytest.raises(InputError, match=match):
        read_examples(data)


def test_a_split_column_allows_only_the_parts(tmp_path: Path, write_source: Write) -> None:
    write_source("a.parquet", {"text": ["fine"], "label": ["good"], "part": ["rest"]})
    data = LabelledData(input=str(tmp_path / "in"), split_column="part")
    with pytest.raises(InputError, match=r"row 0: 'part' is 'rest', not one of train, valid, test"):
        read_examples(data)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [None, ""], "label": ["x", "y"]}, "none of 2 rows has a text .*data.text_column"),
        ({"text": ["a", "b"], "label": pa.nulls(2)}, r"all lack a label\. Set data.label_column"),
        ({"text": ["a", "b"], "label": [None, " "]}, r"all lack a label\. Set data.label_column"),
        ({"text": ["a"], "label": pa.nulls(1, pa.float64())}, "Set data.label_column"),
        ({"text": ["a", None], "label": [None, "x"]}, "1 lack a text, the others lack a label"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "none of 0 rows"),
        ({"body": ["a"], "label": ["x"]}, "no column 'text'"),
    ],
)
def test_an_input_without_usable_rows_is_an_error(
    tmp_path: Path, write_source: Write, columns: dict[str, list[str]], message: str
) -> None:
    write_source("a.parquet", columns)
    with pytest.raises(InputError, match=message) as error:
        read_examples(LabelledData(input=str(tmp_path / "in")))
    assert "\n" not in str(error.value)


def test_missing_answers_name_their_column(tmp_path: Path, write_source: Write) -> None:
    write_source("a.parquet", {"text": ["a"], "reply": pa.nulls(1)})
    data = LabelledData(input=str(tmp_path / "in"), response_column="reply")
    with pytest.raises(InputError, match=r"all lack an answer\. Set data.response_column"):
        read_examples(data)


def test_texts_that_read_the_same_have_one_key() -> None:
    texts = ["Good  day", "good day\n", "ＧＯＯＤ day", "good days"]
    keys = text_keys([Example("", text, "") for text in texts])
    assert keys[0] == keys[1] == keys[2] != keys[3]
