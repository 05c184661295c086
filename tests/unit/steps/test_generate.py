"""What becomes of generated ids: text, stop texts, counts."""

from __future__ import annotations

import pytest

from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.settings.job import GenerateStep
from glmbatch.steps.generate import stop_check, write_up
from tests.support import CAUSAL


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CAUSAL)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_plain([text])[0]


def test_an_answer_is_stripped_and_counted(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "  很好 \n")
    writing = write_up(GenerateStep(name="reply"), ids, "length", 7, tokenizer)
    assert (writing.text, writing.finish_reason, writing.prompt_tokens) == ("很好", "length", 7)
    assert writing.completion_tokens == len(ids)


def test_a_stop_text_ends_the_answer_before_it(tokenizer: Tokenizer) -> None:
    step = GenerateStep(name="reply", stop=["END", "停"])
    writing = write_up(step, ids_of(tokenizer, "很好。停 and END"), "length", 1, tokenizer)
    assert (writing.text, writing.finish_reason) == ("很好。", "stop")


@pytest.mark.parametrize("stop", ["END", "停", "\n\n问：", "🎉"])
def test_a_stop_text_is_seen_with_the_token_that_completes_it(
    tokenizer: Tokenizer, stop: str
) -> None:
    check = stop_check(GenerateStep(name="reply", stop=["never", stop]), tokenizer)
    assert check is not None
    ids = ids_of(tokenizer, f"一些文字 and words {stop} and more")
    seen = next(count for count in range(len(ids) + 1) if check(ids[:count]))
    assert stop in tokenizer.decode(ids[:seen])
    assert stop not in tokenizer.decode(ids[: seen - 1])


def test_a_step_without_stop_texts_needs_no_check(tokenizer: Tokenizer) -> None:
    assert stop_check(GenerateStep(name="reply"), tokenizer) is None
