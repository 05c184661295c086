"""The names of the answer columns; no other module spells them out."""

from __future__ import annotations

import re

from glmbatch.settings.columns import Columns
from glmbatch.settings.job import ClassifyStep, GenerateStep
from tests.support import ROOT

ENDS = (
    "error|error_type|key|score|scores|margin|"
    "finish_reason|prompt_tokens|completion_tokens|log_prob|mean_log_prob|least_log_prob"
)


def test_the_columns_of_a_step_are_in_output_order() -> None:
    assert ClassifyStep(name="mood").answer_columns == [
        "mood",
        "mood_score",
        "mood_scores",
        "mood_margin",
        "mood_error",
        "mood_error_type",
        "mood_key",
    ]
    assert GenerateStep(name="reply").answer_columns == [
        "reply",
        "reply_finish_reason",
        "reply_prompt_tokens",
        "reply_completion_tokens",
        "reply_error",
        "reply_error_type",
        "reply_key",
    ]
    asking = GenerateStep(name="reply", log_probs=True)
    assert asking.answer_columns[3:5] == ["reply_completion_tokens", "reply_log_prob"]
    abstaining = GenerateStep(name="reply", abstain_below=0.5)
    assert abstaining.answer_columns == GenerateStep(name="reply", confidence=True).answer_columns
    assert abstaining.answer_columns[4:7] == [
        "reply_log_prob",
        "reply_mean_log_prob",
        "reply_least_log_prob",
    ]


def test_each_column_name_begins_with_its_step() -> None:
    columns = Columns("mood")
    for name in ENDS.split("|"):
        assert getattr(columns, name) == f"mood_{name}"


def test_no_other_module_spells_out_the_names() -> None:
    spelled = re.compile(rf"""[}}"]_({ENDS})["']""")
    for path in sorted((ROOT / "glmbatch").rglob("*.py")):
        if path.name != "columns.py":
            assert not spelled.search(path.read_text()), path
