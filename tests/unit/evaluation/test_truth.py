"""Which columns of labelled rows have the truth, and how their values are read."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import pyarrow as pa
import pytest

from glmbatch.errors import InputError
from glmbatch.evaluation.truth import (
    Truth,
    allowed_truths,
    candidates,
    check_labels,
    check_names,
    truth_of,
)
from glmbatch.settings.job import AnyStep, ClassifyStep, ExtractStep, GenerateStep

MOOD = ClassifyStep(name="mood", labels=["1", "2"])
TOPICS = ClassifyStep(name="topics", labels=["a", "b"], multiple=True)
REPLY = GenerateStep(name="reply")
FACTS = ExtractStep.model_validate(
    {
        "name": "facts",
        "fields": {
            "stars": {"type": "integer", "nullable": True},
            "day": "date",
            "good": "boolean",
            "tags": {"type": "list", "items": "text"},
        },
    }
)


def truth(
    step: AnyStep, columns: dict[str, Any], given: dict[str, str] | None = None, read: str = "text"
) -> Truth | None:
    given = given or {}
    places = candidates(step, [step], given, {read})
    return truth_of(step, pa.table(columns), places, given)


def test_labels_are_read_as_training_reads_them() -> None:
    for values in ([1, 2, None], [1.0, 2.0, float("nan")], ["1", " 2 ", " "]):
        found = truth(MOOD, {"label": values})
        assert found is not None
        assert found.values["mood"] == ["1", "2", None] and found.known_rows == [True, True, False]
    coded = pa.array(["1", None]).dictionary_encode()
    assert truth(MOOD, {"mood": coded}).values["mood"] == ["1", None]  # type: ignore[union-attr]


def test_the_column_of_the_steps_name_comes_first() -> None:
    columns = {"label": ["1"], "mood": ["2"], "gold": ["3"]}
    assert truth(MOOD, columns).columns == {"mood": "mood"}  # type: ignore[union-attr]
    found = truth(MOOD, columns, {"mood": "gold"})
    assert found is not None and found.values["mood"] == ["3"]
    assert truth(REPLY, columns) is None  # `label` is for labels alone


def test_a_label_column_is_not_shared_by_two_steps() -> None:
    other = MOOD.model_copy(update={"name": "other"})
    assert candidates(MOOD, [MOOD, other], {}, set()) == {"mood": ["mood"]}


def test_several_labels_are_lists_or_one_text() -> None:
    found = truth(TOPICS, {"topics": [["b", "a", "b"], [], None]})
    assert found is not None and found.values["topics"] == [["a", "b"], [], None]
    found = truth(TOPICS, {"topics": [["a", None], ["b", " "], ["a"]]})
    assert found is not None and found.values["topics"] == [None, None, ["a"]], "as training"
    found = truth(TOPICS, {"label": ["a", None]})
    assert found is not None and found.values["topics"] == [["a"], None]


def test_fields_are_read_from_columns_structs_and_json() -> None:
    expected = {"stars": [3], "day": [date(2026, 1, 2)], "good": [True], "tags": [["x"]]}
    whole = {"stars": 3, "day": "2026-01-02", "good": True, "tags": ["x"]}
    text = '{"stars": 3, "day": "2026-01-02", "good": true, "tags": ["x"]}'
    apart = {"facts_stars": [3.0], "day": [datetime(2026, 1, 2)], "good": ["True"], "tags": [["x"]]}
    for columns in ({"facts": [whole]}, {"facts": [text]}, apart):
        found = truth(FACTS, columns)
        assert found is not None and found.values == expected
    found = truth(FACTS, {"rating": [2], "facts": [whole]}, {"facts.stars": "rating"})
    assert found is not None and found.values["stars"] == [2]


def test_a_null_field_is_a_truth_where_others_are_known() -> None:
    found = truth(FACTS, {"facts_stars": [None, None], "facts_good": [True, None]})
    assert found is not None and found.known_rows == [True, False]
    # A null of a field that cannot be null says that nobody knows it.
    found = truth(FACTS, {"facts_stars": [None, 3], "facts_good": [True, None]})
    assert found is not None
    assert found.known == {"stars": [True, True], "good": [True, False]}


def test_a_field_that_an_object_lacks_is_not_known() -> None:
    objects = ['{"stars": null, "good": true}', '{"good": true}']
    found = truth(FACTS, {"facts": objects})
    assert found is not None
    empty = truth(FACTS, {"facts": [*objects, "{}", '{"other": 1}']})
    assert empty is not None and empty.known_rows == [True, True, False, False]
    assert (found.known["stars"], found.known["good"]) == ([True, False], [True, True])
    found = truth(FACTS, {"facts_tags": ['["x", "y"]']})
    assert found is not None and found.values["tags"] == [["x", "y"]]


def test_a_column_that_prompts_read_is_no_truth_of_a_field() -> None:
    assert truth(FACTS, {"stars": [3]}, read="stars") is None


@pytest.mark.parametrize(
    ("step", "columns", "given", "message"),
    [
        (MOOD, {"x": [1]}, {"mood": "y"}, "--truth mood=y: the rows have no column 'y'"),
        (REPLY, {"reply": [["x"]]}, {}, "column 'reply' holds list<item: string>"),
        (
            FACTS,
            {"facts_stars": [1.5]},
            {},
            "1.5 in row 0, which is not the integer",
        ),
        (FACTS, {"facts_good": ["maybe"]}, {}, "'maybe' in row 0, which is not the boolean"),
        (FACTS, {"facts": [None, '{"starz": 3}']}, {}, "has objects with .'starz'., and"),
        (
            FACTS,
            {"facts_tags": ["noise, size"]},
            {},
            "size' in row 0, which is not the list",
        ),
        (FACTS, {"facts": ['{"tags": "x"}']}, {}, "'x' in row 0, which is not the list of text"),
        (FACTS, {"facts_stars": [[3]]}, {}, "in row 0, which is not the integer"),
        (FACTS, {"facts_good": [5]}, {}, "5 in row 0, which is not the boolean"),
        (FACTS, {"facts": ["no JSON"]}, {}, "'no JSON' in row 0, which is no object of fie"),
    ],
)
def test_what_cannot_be_a_truth_is_refused(
    step: AnyStep, columns: dict[str, Any], given: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        truth(step, columns, given)


def test_truths_that_are_no_labels_are_refused() -> None:
    stars = truth(MOOD, {"stars": [5, 3, 5, None]}, {"mood": "stars"})
    refused = (
        r"--truth mood=stars: the column has \['5', '3'\], and none .* are \['1', '2'\]\. Name"
    )
    with pytest.raises(InputError, match=refused):
        check_labels(MOOD, allowed_truths(MOOD), stars)
    check_labels(MOOD, {"mood": ["5", "2"]}, stars)
    head = ClassifyStep(name="mood")
    check_labels(head, allowed_truths(head), stars)  # its labels are not known yet
    with pytest.raises(InputError, match="none of them is a label"):
        check_labels(head, allowed_truths(head, ["1", "2"]), stars)
    lists = truth(TOPICS, {"topics": [["c"], []]})
    with pytest.raises(InputError, match=r"evaluate.truth topics=topics: the column has \['c'\]"):
        check_labels(TOPICS, allowed_truths(TOPICS), lists, "evaluate.truth")
    check_labels(TOPICS, allowed_truths(TOPICS), truth(TOPICS, {"topics": [[], []]}))


CHOOSING = ExtractStep.model_validate(
    {
        "name": "facts",
        "fields": {
            "tone": {"choices": ["warm", "cold"], "nullable": True},
            "parts": {"type": "list", "items": {"choices": ["lid", "cap"]}},
        },
    }
)


def test_truths_that_are_no_choices_are_refused() -> None:
    odd = truth(CHOOSING, {"tone": ["hot", "icy", None, "hot"]})
    refused = r"--truth facts\.tone=tone: the column has \['hot', 'icy'\], and none .* is a choice"
    with pytest.raises(InputError, match=refused):
        check_labels(CHOOSING, allowed_truths(CHOOSING), odd)
    with pytest.raises(
        InputError, match=r"facts\.parts=parts: .*; the choices are \['lid', 'cap'\]"
    ):
        check_labels(CHOOSING, allowed_truths(CHOOSING), truth(CHOOSING, {"parts": [["top"], []]}))


def test_some_truths_that_are_no_choices_are_named(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"tone": ["warm", None, "hot", "icy"], "parts": [["lid"], [], ["cap"], ["lid"]]}
    check_labels(CHOOSING, allowed_truths(CHOOSING), truth(CHOOSING, columns), "evaluate.truth")
    assert caplog.messages == [
        "evaluate.truth facts.tone=tone: row 2 has 'hot', which is no choice of the field, and 1 "
        "more truth is none either: answers to them count as wrong; the choices are "
        "['warm', 'cold']"
    ]
    caplog.clear()
    check_labels(MOOD, allowed_truths(MOOD), truth(MOOD, {"mood": ["1", "3"]}))
    assert "row 1 has '3', which is no label of the step: answers to it" in caplog.text


def test_unknown_steps_are_refused() -> None:
    with pytest.raises(InputError, match=r"--truth moods: .*; it has \['mood', 'facts', "):
        check_names([MOOD, FACTS], {"moods": "x"})
    check_names([MOOD, FACTS], {"mood": "x", "facts.day": "y"})
