"""Conditions and prompts over earlier answers: what no such answer can be is refused."""

from __future__ import annotations

from typing import Any

import pytest

from glmbatch.errors import InputError
from glmbatch.settings.job import JobConfig
from glmbatch.steps.inputs import check_conditions, prompt_inputs, schema_needs
from tests.support import Settings

FACTS = {
    "kind": "extract",
    "name": "facts",
    "fields": {
        "tone": {"choices": ["positive", "negative"]},
        "rating": {"type": "integer", "minimum": 1, "maximum": 5},
        "aspects": {"type": "list", "items": {"choices": ["fit", "price"]}},
        "price": "number",
    },
    "abstain_below": 0.5,
}
TOPICS = {"kind": "classify", "name": "topics", "labels": ["fit", "price"], "multiple": True}


def job(settings: dict[str, Any], **last: Any) -> JobConfig:
    reply = {"kind": "generate", "name": "reply", **last}
    return JobConfig.model_validate({**settings, "steps": [FACTS, TOPICS, reply]})


def check(settings: dict[str, Any], when: str) -> None:
    conditioned = job(settings, when=when)
    check_conditions(
        conditioned.steps, prompt_inputs(conditioned), dict.fromkeys(("facts", "topics"), ())
    )


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ("facts_tone == 'negativ'", "step 'facts' never answers 'negativ' in facts_tone; its choi"),
        ("facts_rating > 7", "never answers > 7 in facts_rating; its bounds are 1 and 5"),
        ("5 < facts_rating", "never answers > 5 in facts_rating"),
        ("facts_rating <= 0", "never answers <= 0 in facts_rating"),
        ("facts_rating in (5, 6)", "never answers 6 in facts_rating"),
        ("facts_finish_reason == 'lenght'", "its finish reasons are .'stop', 'length'"),
        ("'prize' in facts_aspects", "its choices are .'fit', 'price'"),
        ("'aspect' in facts_abstained", "its fields are .'tone'"),
        ("'prize' in topics", "step 'topics' never answers 'prize'; its labels are"),
        ("topics == 'price'", "write 'price' in topics"),
    ],
)
def test_what_an_answer_never_is_is_refused(job_settings: Settings, when: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        check(job_settings(), when)
    assert "\n" not in str(refused.value)
    assert "Set steps[2].when." in str(refused.value)


@pytest.mark.parametrize(
    "when",
    [
        "facts_tone == 'negative' and facts_tone_score > 0.9",
        "facts_rating >= 5 or facts_rating <= 1 or 0 < facts_rating < 6",
        "facts_price > 1e9",
        "'price' in topics and 'fit' not in facts_aspects",
        "facts_error_type == 'abstained' or 'tone' in facts_abstained",
    ],
)
def test_what_an_answer_may_be_is_taken(job_settings: Settings, when: str) -> None:
    check(job_settings(), when)


def test_a_prompt_names_the_answer_it_may_mean(job_settings: Settings) -> None:
    misspelt = job(job_settings(), prompt_template="{text} {facts_ratng} {facts_wish}")
    needs = {
        need.name: need.advice for need in schema_needs(misspelt, prompt_inputs(misspelt)).read
    }
    assert needs["facts_ratng"] == "; did you mean facts_rating?"
    assert "step 'facts' answers" in needs["facts_wish"]
    assert needs[misspelt.data.text_column] == ""
    unusable = job(job_settings(), prompt_template="{text} {facts_error}")
    needs = {
        need.name: need.advice for need in schema_needs(unusable, prompt_inputs(unusable)).read
    }
    assert needs["facts_error"] == "; no prompt may use errors or keys of step 'facts'"
