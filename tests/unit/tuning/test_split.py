"""The audit of labelled rows; no text is in two parts of a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.errors import InputError
from glmbatch.settings.tuning import LabelledData
from glmbatch.tuning.examples import PARTS, Example
from glmbatch.tuning.split import Labelled, read_labelled, split_by_text
from tests.support import Write
from tests.unit.tuning.rows import labelled


def read(tmp_path: Path, **fields: Any) -> Labelled:
    return read_labelled(LabelledData(input=str(tmp_path / "in"), **fields))


def test_rows_left_out_are_counted(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(60)
    rows["text"] += [None, " ", rows["text"][0], rows["text"][1], "twice", "twice"]
    rows["label"] += ["good", "bad", rows["label"][0], None, "good", "bad"]
    write_source("a.parquet", rows)
    audit = read(tmp_path).audit
    assert (audit.rows, audit.used, audit.without_text, audit.without_label) == (66, 61, 2, 1)
    assert (audit.repeated, audit.conflicting) == (1, 2)
    assert any("two labels" in warning for warning in audit.warnings)
    assert sum(audit.labels.values()) == sum(audit.parts.values()) == audit.used


def test_one_text_may_have_several_answers(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(60)
    write_source("a.parquet", {"text": rows["text"] * 2, "label": rows["label"] + ["other"] * 60})
    audit = read(tmp_path, response_column="label").audit
    assert (audit.used, audit.conflicting) == (120, 0)


def test_a_given_split_loses_the_rows_that_leak(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(60)
    part = (["train"] * 8 + ["valid", "test"]) * 6
    rows["text"][0] = rows["text"][9]
    rows["label"][0] = rows["label"][9]
    write_source("a.parquet", {**rows, "part": part})
    result = read(tmp_path, split_column="part")
    assert result.audit.leaking == 1
    assert [len(result.parts[name]) for name in PARTS] == [47, 6, 6]


LABELLED = st.lists(
    st.tuples(st.text(min_size=1, max_size=2), st.sampled_from("xyz")), min_size=1, max_size=60
)


def normalised(examples: list[Example]) -> set[str]:
    return {example.same for example in examples}


@given(rows=LABELLED, seed=st.integers(0, 3))
def test_spellings_of_a_text_are_in_one_part(rows: list[tuple[str, str]], seed: int) -> None:
    examples = [Example(str(at), text, label) for at, (text, label) in enumerate(rows)]
    split = split_by_text(examples, LabelledData(input="x", seed=seed))
    assert sum(map(len, split.values())) == len(rows)
    texts = [normalised(split[name]) for name in PARTS]
    assert sum(map(len, texts)) == len(normalised(examples))


@given(rows=LABELLED, seed=st.integers(0, 3))
def test_the_order_of_rows_does_not_change_the_split(
    rows: list[tuple[str, str]], seed: int
) -> None:
    examples = [Example(str(at), text, label) for at, (text, label) in enumerate(rows)]
    data = LabelledData(input="x", seed=seed)
    split = split_by_text(examples, data)
    again = split_by_text(examples[::-1], data)
    for name in PARTS:
        assert normalised(split[name]) == normalised(again[name])


def test_labels_keep_their_shares_in_each_part(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(400)
    rows["label"] = ["rare" if at % 23 == 0 else label for at, label in enumerate(rows["label"])]
    write_source("a.parquet", rows)
    result = read(tmp_path)
    for name in PARTS:
        labels = [example.label for example in result.parts[name]]
        assert 0.02 < labels.count("rare") / len(labels) < 0.08


def test_a_rare_label_is_a_warning(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(400)
    rows["label"] = ["rare" if at % 40 == 0 else label for at, label in enumerate(rows["label"])]
    write_source("a.parquet", rows)
    warnings = " ".join(read(tmp_path).audit.warnings)
    assert "'rare' has 10 rows" in warnings
    assert "macro_f1" in warnings and "scores are unreliable" in warnings


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", "b", "c"], "label": ["x"] * 3}, "all rows have the label 'x'. Add"),
        (
            {"text": [*"abcc"], "label": [*"xxxy"]},
            "'x', but for 2 rows whose text has several labe",
        ),
        (
            {"text": ["a", "a"], "label": ["x", "y"]},
            "every text has several labels. Correct column",
        ),
        ({"text": [*"abcdef"], "label": [*"xXxXxX"]}, "differ only in case: "),
        ({"text": ["a", "b"], "label": ["x", "y"]}, "'x' has 1 different texts, but needs 3"),
        (
            {"text": [f"t{n}" for n in range(2000)], "label": [str(n) for n in range(2000)]},
            "has 2000 different values, too many for labels",
        ),
    ],
)
def test_unusable_labels_are_an_error(
    tmp_path: Path, write_source: Write, columns: dict[str, list[str]], message: str
) -> None:
    write_source("a.parquet", columns)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_label_without_training_rows_is_an_error(tmp_path: Path, write_source: Write) -> None:
    rows = labelled(30)
    write_source("a.parquet", {**rows, "part": ["train"] * 20 + ["valid"] * 5 + ["test"] * 5})
    write_source("b.parquet", {"text": ["new"], "label": ["never seen"], "part": ["test"]})
    message = r"test has labels \['never seen'\], which no training row has"
    with pytest.raises(InputError, match=message):
        read(tmp_path, split_column="part")
