"""Which labelled rows are used, what is found wrong with them, and that no text is on both sides of a split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmbatch.errors import InputError
from glmbatch.settings.tuning import LabelledData
from glmbatch.tuning.examples import PARTS, Example, _by_text, read_labelled
from tests.unit.tuning.rows import labelled

Write = Callable[..., Path]


def read(tmp_path: Path, **fields: Any) -> Any:
    return read_labelled(LabelledData(input=str(tmp_path / "in"), **fields))


def test_each_row_that_cannot_be_used_is_counted(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(60)
    rows["text"] += [None, " ", rows["text"][0], rows["text"][1], "twice", "twice"]
    rows["label"] += ["good", "bad", rows["label"][0], None, "good", "bad"]
    write_source("a.parquet", rows)
    audit = read(tmp_path).audit
    assert (audit.rows, audit.used, audit.without_text, audit.without_label) == (66, 61, 2, 1)
    assert (audit.repeated, audit.conflicting) == (1, 2)
    assert any("two labels" in warning for warning in audit.warnings)
    assert read(tmp_path, conflicts="keep").audit.used == 63
    assert sum(audit.labels.values()) == sum(audit.parts.values()) == audit.used


def test_a_given_split_loses_the_rows_that_leak(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(60)
    part = (["train"] * 8 + ["valid", "test"]) * 6
    rows["text"][0] = rows["text"][9]
    rows["label"][0] = rows["label"][9]
    write_source("a.parquet", {**rows, "part": part})
    found = read(tmp_path, split_column="part")
    assert found.audit.leaking == 1
    assert [len(found.parts[name]) for name in PARTS] == [47, 6, 6]
    with pytest.raises(InputError, match=r"row 0: 'label' is '.*', not one of train, valid, test"):
        read(tmp_path, split_column="label")


def test_a_folder_that_names_a_value_is_a_column(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(60)
    for label in ("good", "bad", "so so"):
        texts = [
            text for text, each in zip(rows["text"], rows["label"], strict=True) if each == label
        ]
        write_source(f"part=train/mood={label.replace(' ', '%20')}/a.parquet", {"text": texts})
        write_source(
            f"part=valid/mood={label.replace(' ', '%20')}/a.parquet", {"text": [f"{label} {label}"]}
        )
        write_source(
            f"part=test/mood={label.replace(' ', '%20')}/a.parquet", {"text": [f"{label}!"]}
        )
    found = read(tmp_path, label_column="mood", split_column="part")
    assert found.labels == ("bad", "good", "so so")
    assert [len(found.parts[name]) for name in PARTS] == [60, 3, 3]
    with pytest.raises(InputError, match=r"no column 'label'; it has \['text', 'part', 'mood'\]"):
        read(tmp_path)


LABELLED = st.lists(
    st.tuples(st.text(min_size=1, max_size=2), st.sampled_from("xyz")), min_size=1, max_size=60
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=LABELLED, seed=st.integers(0, 3))
def test_a_text_stands_on_one_side_wherever_its_rows_stand(
    rows: list[tuple[str, str]], seed: int
) -> None:
    examples = [Example(str(at), text, label) for at, (text, label) in enumerate(rows)]
    data = LabelledData(input="x", seed=seed)
    split = _by_text(examples, data)
    sides = {name: {each.text for each in split[name]} for name in PARTS}
    assert sum(map(len, split.values())) == len(rows)
    assert sum(map(len, sides.values())) == len({text for text, _ in rows})
    same = [{each.same for each in split[name]} for name in PARTS]
    assert sum(map(len, same)) == len(set().union(*same)), (
        "nor one that differs in case and blanks alone"
    )
    again = _by_text(examples[::-1], data)
    assert all({each.text for each in again[name]} == sides[name] for name in PARTS)


def test_labels_keep_their_shares_on_each_side(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(400)
    rows["label"] = ["rare" if at % 23 == 0 else label for at, label in enumerate(rows["label"])]
    write_source("a.parquet", rows)
    found = read(tmp_path)
    for name in PARTS:
        share = sum(each.label == "rare" for each in found.parts[name]) / len(found.parts[name])
        assert 0.02 < share < 0.08
    assert any(
        "class_weights" in warning or "scores say little" in warning
        for warning in found.audit.warnings
    )


def test_whole_numbers_are_labels_and_other_kinds_are_not(
    tmp_path: Path, write_source: Write
) -> None:
    rows = labelled(60)
    numbers = [sorted(set(rows["label"])).index(label) for label in rows["label"]]
    write_source("a.parquet", {**rows, "stars": numbers, "sure": [0.5] * 60})
    assert read(tmp_path, label_column="stars").labels == ("0", "1", "2")
    with pytest.raises(InputError, match="'sure' holds double, not text or whole numbers"):
        read(tmp_path, label_column="sure")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", "b", "c"], "label": ["x"] * 3}, "all rows have the label 'x'"),
        ({"text": [None, ""], "label": ["x", "y"]}, "none of 2 rows has a text and a label"),
        ({"text": ["a", "b"], "label": ["x", "y"]}, "'x' has 1 different texts, it needs 3"),
        ({"body": ["a"], "label": ["x"]}, "no column 'text'"),
        (
            {"text": [f"t{n}" for n in range(2000)], "label": [str(n) for n in range(2000)]},
            "2000 labels, as if",
        ),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "none of 0 rows"),
    ],
)
def test_rows_that_nothing_can_be_trained_on_are_told(
    tmp_path: Path, write_source: Write, rows: dict[str, Any], message: str
) -> None:
    write_source("a.parquet", rows)
    with pytest.raises(InputError, match=message) as told:
        read(tmp_path)
    assert "\n" not in str(told.value)


def test_a_label_that_no_training_row_has_is_told(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(30)
    write_source("a.parquet", {**rows, "part": ["train"] * 20 + ["valid"] * 5 + ["test"] * 5})
    write_source("b.parquet", {"text": ["new"], "label": ["never seen"], "part": ["test"]})
    with pytest.raises(
        InputError, match=r"test has the labels \['never seen'\], which no training row has"
    ):
        read(tmp_path, split_column="part")
