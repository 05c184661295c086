"""Answers of a model of random weights are whole, within their schema, and always the same."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import GlmForCausalLM

from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    Engine,
    GenerateRequest,
    GenerateResult,
)
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.glm.form_tokens import form_tokens
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.ledger.rowkeys import row_key
from glmbatch.settings.job import ExtractStep
from glmbatch.steps.answers import Answer, AnswerCounter, answers_schema, answers_table
from glmbatch.steps.extract import Extraction, as_json, ask_extractions
from glmbatch.steps.prompt import Prompt, RowFault, build_prompts
from tests.support import CAUSAL
from tests.unit.glm.cuda_on_cpu import on_cuda_path
from tests.unit.glm.tiny_glm import config
from tests.unit.steps.forms import SCHEMAS, faults, step_of, steps

Asked = dict[bytes, Extraction | RowFault]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CAUSAL)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Any:
    """Weights that choose ends of values often enough, and everything else as often as not."""
    generator = torch.Generator().manual_seed(3)
    model: Any = GlmForCausalLM(
        config(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048, num_hidden_layers=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    model.prefix_kv = None
    return model.eval().requires_grad_(False)


@contextmanager
def engine_of(model: Any, tokenizer: Tokenizer, **limits: Any) -> Iterator[TorchEngine]:
    engine = TorchEngine(
        copy.deepcopy(model), eos_id=tokenizer.eos_id, token_count=tokenizer.vocab_size, **limits
    )
    try:
        yield engine
    finally:
        engine.close()


def prompts_of(step: ExtractStep, rows: int, tokenizer: Tokenizer) -> dict[bytes, Prompt]:
    rng = random.Random(step.name)
    words = ["lamp", "is", "好", '"', "\\", "}", "1", "bad", "\U0001f600", "\n"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) + str(at) for at in range(rows)]
    built = build_prompts(
        step,
        [{"text": text} for text in texts],
        tokenizer,
        chat=False,
        max_input_tokens=1500,
        texts=["text"],
    )
    prompts = {}
    for prompt in built:
        assert isinstance(prompt, Prompt)
        prompts[row_key(step.name, prompt.text)] = prompt
    return prompts


def ask(step: ExtractStep, prompts: dict[bytes, Prompt], engine: Engine, to: Tokenizer) -> Asked:
    return dict(ask_extractions(step, prompts, engine, to))


def assert_same(answers: Asked, expected: Asked) -> None:
    """Scores may differ by rounding, as everywhere; values and counts never."""
    assert answers.keys() == expected.keys()
    for key, answer in answers.items():
        other = expected[key]
        assert isinstance(answer, Extraction) and isinstance(other, Extraction)
        assert answer.scores == pytest.approx(other.scores, abs=1e-5)
        assert replace(answer, scores={}) == replace(other, scores={})


def least(step: ExtractStep) -> int:
    return sum(field.least_tokens for field in step.fields)


def test_none_of_a_thousand_is_broken_or_depends_on_its_batch(
    model: Any, tokenizer: Tokenizer
) -> None:
    cut = whole = 0
    with (
        engine_of(model, tokenizer) as engine,
        engine_of(model, tokenizer, max_slots=7, max_batch_tokens=300) as other,
    ):
        sampled = steps(temperature=1.0, top_k=0, top_p=1.0)
        for (fields, plain), extra in product(zip(SCHEMAS, sampled, strict=True), range(4)):
            max_tokens = least(plain) + extra**3
            step = plain.model_copy(update={"max_tokens": max_tokens, "seed": extra})
            prompts = prompts_of(step, 25, tokenizer)
            answers = ask(step, prompts, engine, tokenizer)
            assert len(answers) == 25
            assert_same(ask(step, dict(reversed(prompts.items())), other, tokenizer), answers)
            for answer in answers.values():
                assert isinstance(answer, Extraction)
                assert faults(fields, answer.values) == []
                assert answer.completion_tokens <= max_tokens
                cut += answer.finish_reason == "length"
                whole += answer.finish_reason == "stop"
    assert cut > 100 and whole > 100


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_are_the_same_in_any_batch(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    asked = steps(max_tokens=45)[1::2] + steps(max_tokens=45, temperature=1.0)[::2]
    prompts = [prompts_of(step, 3, tokenizer) for step in asked]
    expected = []
    with engine_of(model, tokenizer, max_slots=1) as engine:
        for step, rows in zip(asked, prompts, strict=True):
            expected.append(ask(step, rows, engine, tokenizer))
    with (
        on_cuda_path(monkeypatch) if ahead else nullcontext(),
        engine_of(model, tokenizer, max_slots=3, max_batch_tokens=64) as engine,
    ):
        for step, rows, answers in zip(asked, prompts, expected, strict=True):
            backwards = dict(reversed(rows.items()))
            assert_same(ask(step, backwards, engine, tokenizer), answers)


@pytest.mark.parametrize("layout", ["columns", "struct"])
def test_columns_have_the_types_of_the_settings(
    model: Any, tokenizer: Tokenizer, layout: str
) -> None:
    with engine_of(model, tokenizer) as engine:
        for step in steps(layout=layout, max_tokens=60, abstain_below=0.4):
            answers = ask(step, prompts_of(step, 3, tokenizer), engine, tokenizer)
            table = answers_table(
                step,
                (),
                [
                    *(Answer(answer, key) for key, answer in answers.items()),
                    Answer(RowFault("empty_text", "text is empty")),
                ],
            )
            assert table.schema == answers_schema(step, ())
            assert table.schema.names == step.answer_columns
            counts = AnswerCounter(step, table).count(slice(0, 4))
            assert counts["faults"] == {"empty_text": 1}
            assert sum(counts["finish_reasons"].values()) == 3


def test_a_choice_has_its_probability(model: Any, tokenizer: Tokenizer) -> None:
    step = step_of({"mood": {"choices": ["yes", "no"]}})
    prompts = prompts_of(step, 5, tokenizer)
    with engine_of(model, tokenizer) as engine:
        answers = ask(step, prompts, engine, tokenizer)
    for answer in answers.values():
        assert isinstance(answer, Extraction)
        assert answer.values["mood"] in ("yes", "no")
        assert 0.5 <= answer.scores["mood"] <= 1
        assert (answer.finish_reason, answer.completion_tokens) == ("stop", 0)
    schema = answers_schema(step, ())
    assert schema.field("facts_mood_score").type == pa.float64()


class Counting:
    """An engine that counts the texts which it reads for choices."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.reads = 0

    def classify(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyResult]:
        for result in self._engine.classify(self._counted(requests)):
            fails = result.index == 4
            yield replace(result, scores=(), error="no memory") if fails else result

    def _counted(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyRequest]:
        for request in requests:
            self.reads += 1
            yield request


def test_all_choices_of_a_row_are_asked_behind_one_read(model: Any, tokenizer: Tokenizer) -> None:
    fields: dict[str, Any] = {
        "mood": {"choices": ["good", "bad", "so so"]},
        "moody": {"choices": ["yes", "no"], "nullable": True},
        "好": {"choices": ["高", "低"]},
    }
    step = step_of(fields)
    prompts = prompts_of(step, 4, tokenizer)
    with engine_of(model, tokenizer) as engine:
        counting: Any = Counting(engine)
        answers = ask(step, prompts, counting, tokenizer)
        apart = [ask(step_of({x: fields[x]}), prompts, engine, tokenizer) for x in fields]
    assert counting.reads == 4
    # The second field of the second row fails, and the row once.
    assert [isinstance(answers[key], RowFault) for key in prompts] == [False, True, False, False]
    for key, answer in answers.items():
        if isinstance(answer, Extraction):
            for name, others in zip(fields, apart, strict=True):
                alone = others[key]
                assert isinstance(alone, Extraction)
                assert answer.values[name] == alone.values[name]
                assert answer.scores[name] == pytest.approx(alone.scores[name], abs=1e-6)


class Spelled:
    """An engine whose every answer is this text."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._ids = tuple(form_tokens(tokenizer).encode(text.encode()))

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[GenerateResult]:
        for request in requests:
            yield GenerateResult(request.index, self._ids, "stop")


def test_texts_have_no_blanks_at_their_ends(tokenizer: Tokenizer) -> None:
    written = {
        "a": " a lamp\u3000\n",
        "most": " lamp",
        "code": " X ",
        "tags": [" red ", "  "],
        "none": None,
        "blank": " ",
    }
    fields = {
        "a": "text",
        "most": {"type": "text", "max_length": 5},
        "code": {"type": "text", "pattern": " [A-Z] "},
        "tags": {"type": "list", "items": "text"},
        "none": {"type": "text", "nullable": True},
        "blank": "text",
    }
    step = step_of(fields, max_tokens=99)
    engine: Any = Spelled(as_json(written), tokenizer)
    (answer,) = ask(step, prompts_of(step, 1, tokenizer), engine, tokenizer).values()
    assert isinstance(answer, Extraction)
    assert answer.values == {
        "a": "a lamp",
        "most": "lamp",
        "code": " X ",
        "tags": ["red", ""],
        "none": None,
        "blank": "",
    }
    assert json.loads(answer.text) == answer.values
    assert faults(fields, answer.values) == []


def test_a_prompt_without_room_says_why(model: Any, tokenizer: Tokenizer) -> None:
    step = step_of({"a": "text"}, max_tokens=2000)
    prompts = prompts_of(step, 1, tokenizer)
    with engine_of(model, tokenizer) as engine:
        (answer,) = ask(step, prompts, engine, tokenizer).values()
    assert isinstance(answer, RowFault)
    assert "the model has 2048 positions" in answer.reason
