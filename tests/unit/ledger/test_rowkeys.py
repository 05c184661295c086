"""Which changes give a new key and which do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.ledger.fragments import Fragment
from glmbatch.ledger.rowkeys import (
    answer_settings,
    answers_key,
    output_key,
    row_key,
    row_seed,
    step_key,
)
from glmbatch.settings.job import ClassifyStep, ExtractStep, GenerateStep, JobConfig
from glmbatch.settings.steps.fields import ExtractField
from glmbatch.settings.steps.generate import GenerateAudits

GREEDY = GenerateStep(name="reply")
SAMPLED = GenerateStep(name="reply", temperature=0.7)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_template": "{text}!"},
        {"system_prompt": "Be kind."},
        {"max_tokens": 9},
        {"stop": ["x"]},
        {"temperature": 0.5},
        {"chat": False},
        {"on_too_long": "truncate"},
        {"max_input_tokens": 100},
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 3},
        {"min_tokens": 2},
        {"log_probs": True},
        {"confidence": True},
        {"abstain_below": 0.5},
        {"history_column": "talk"},
        {"n": 5},
    ],
)
def test_all_that_changes_an_answer_changes_the_step_key(change: dict[str, Any]) -> None:
    assert step_key(GREEDY.model_copy(update=change), "weights") != step_key(GREEDY, "weights")


def test_settings_that_came_later_count_only_when_set() -> None:
    later = {"repetition_penalty", "no_repeat_ngram_size", "min_tokens", "log_probs"}
    later |= {"confidence", "abstain_below", "when", "history_column", "n"}
    assert not later & answer_settings(GREEDY).keys()
    assert not later & answer_settings(ClassifyStep(name="mood")).keys()
    assert answer_settings(GREEDY.model_copy(update={"min_tokens": 2}))["min_tokens"] == 2


def test_audits_and_an_unset_chat_change_no_key() -> None:
    audits = GenerateAudits(max_empty_rate=0.5)
    assert step_key(GREEDY.model_copy(update={"audits": audits}), "w") == step_key(GREEDY, "w")
    assert step_key(GREEDY.model_copy(update={"chat": True}), "w") == step_key(GREEDY, "w")
    assert answer_settings(GREEDY)["chat"] is True
    assert answer_settings(ClassifyStep(name="mood"))["chat"] is None


def test_continuations_have_a_key_of_their_own() -> None:
    bare = GREEDY.model_copy(update={"chat": False})
    assert step_key(bare, "w", chat=False) != step_key(bare, "w")
    labels = ClassifyStep(name="mood", labels=["x", "y"], chat=False)
    assert step_key(labels, "w", chat=False) == step_key(labels, "w")


def test_confidence_in_fields_is_in_the_key_where_set() -> None:
    plain = ExtractStep(name="facts", fields={"a": "text"})
    assert not {"confidence", "abstain_below"} & answer_settings(plain).keys()
    keys = {step_key(plain, "w")}
    for change in ({"confidence": True}, {"abstain_below": 0.5}):
        keys.add(step_key(plain.model_copy(update=change), "w"))
    assert len(keys) == 3


def test_settings_of_fields_that_are_not_set_are_in_no_key() -> None:
    step = ExtractStep(name="facts", fields=[ExtractField(name="a", type="text")])
    assert answer_settings(step)["fields"] == [{"name": "a", "type": "text"}]


def test_other_weights_give_another_step_key() -> None:
    assert step_key(GREEDY, "weights") != step_key(GREEDY, "other weights")


def test_a_renamed_step_keeps_its_key() -> None:
    assert step_key(GREEDY.model_copy(update={"name": "answer"}), "w") == step_key(GREEDY, "w")


@pytest.mark.parametrize("change", [{"seed": 5}, {"top_p": 0.1}, {"top_k": 2}])
def test_sampling_settings_count_only_when_sampling(change: dict[str, Any]) -> None:
    assert step_key(GREEDY.model_copy(update=change), "w") == step_key(GREEDY, "w")
    assert step_key(SAMPLED.model_copy(update=change), "w") != step_key(SAMPLED, "w")


def test_speed_settings_and_paths_change_no_key(tmp_path: Path) -> None:
    keys = set()
    for runtime, folder in [({}, "a"), ({"max_batch_tokens": 99, "retries": 0}, "b")]:
        step = ClassifyStep(name="mood", labels=["x", "y"])
        job = JobConfig.model_validate(
            {
                "data": {"input": "in", "output": folder},
                "model": "m",
                "steps": [step.model_dump()],
                "runtime": runtime,
            }
        )
        fragment = Fragment(
            source=f"{folder}.parquet",
            path=str(tmp_path / folder),
            digest="d",
            stamp=(1, len(runtime)),
            first_row=0,
            rows=5,
            row_groups=(0,),
            skip_rows=0,
        )
        keys.add(answers_key(fragment, "mood", step_key(job.steps[0], "w"), {"text": "text"}, {}))
    assert len(keys) == 1


def test_the_output_key_depends_on_rows_and_step_order() -> None:
    fragment = Fragment(
        source="a.parquet",
        path="",
        digest="d",
        stamp=(0, 0),
        first_row=0,
        rows=5,
        row_groups=(0,),
        skip_rows=0,
    )
    renamed = fragment.model_copy(update={"source": "b.parquet"})
    keys = {output_key(fragment, {"x": "1", "y": "2"}), output_key(fragment, {"y": "2", "x": "1"})}
    assert len(keys | {output_key(renamed, {"x": "1", "y": "2"})}) == 3


def test_a_row_key_depends_on_the_step_and_the_prompt() -> None:
    keys = {row_key("a", "prompt"), row_key("b", "prompt"), row_key("a", "prompt ")}
    assert len(keys) == 3
    assert row_key("a", "prompt") in keys
    assert {len(key) for key in keys} == {16}


def test_a_rows_seed_depends_on_its_key_and_the_steps_seed() -> None:
    seeds = {row_seed(0, b"a"), row_seed(1, b"a"), row_seed(0, b"b")}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**64 for seed in seeds)


@given(asked=st.sets(st.tuples(st.text(max_size=3), st.text(max_size=20)), max_size=30))
def test_different_questions_have_different_keys_and_seeds(asked: set[tuple[str, str]]) -> None:
    keys = {row_key(key, prompt) for key, prompt in asked}
    assert len(keys) == len(asked)
    assert len({row_seed(7, key) for key in keys}) == len(keys)
