"""Generated ids become text, cut at stop texts and counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import pytest

from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
)
from glmbatch.glm.stop_texts import stop_at
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.settings.job import GenerateStep
from glmbatch.steps.generate import (
    Writing,
    ask_writings,
    elect,
    without_unsure,
    write_up,
    writing_columns,
)
from glmbatch.steps.prompt import Prompt, RowFault
from tests.support import CAUSAL


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CAUSAL)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_plain([text])[0]


def result(ids: Sequence[int], reason: str, log_probs: tuple[float, ...] = ()) -> GenerateResult:
    return GenerateResult(0, tuple(ids), reason, log_probs=log_probs)


def test_an_answer_is_stripped_and_counted(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "  很好 \n")
    writing = write_up(GenerateStep(name="reply"), result(ids, "length"), 7, tokenizer)
    assert (writing.text, writing.finish_reason, writing.prompt_tokens) == ("很好", "length", 7)
    assert writing.completion_tokens == len(ids)


def test_log_probabilities_are_summed_only_when_asked_for(tokenizer: Tokenizer) -> None:
    answered = result(ids_of(tokenizer, "好"), "stop", (-0.5, -0.25))
    asking = GenerateStep(name="reply", log_probs=True)
    assert write_up(asking, answered, 7, tokenizer).log_prob == -0.75
    columns = writing_columns(asking, [write_up(asking, answered, 7, tokenizer), None])
    assert columns[-1] == [-0.75, None]
    step = GenerateStep(name="reply")
    assert len(writing_columns(step, [write_up(step, answered, 7, tokenizer)])) == 4


def test_an_unsure_text_is_left_out_with_its_numbers(tokenizer: Tokenizer) -> None:
    answered = result(ids_of(tokenizer, "好"), "stop", (-0.5, -1.5))
    for least, text in ((math.exp(-1) - 1e-9, "好"), (math.exp(-1) + 1e-9, None)):
        step = GenerateStep(name="reply", abstain_below=least)
        writing = without_unsure(step, write_up(step, answered, 7, tokenizer))
        assert writing.text == text
        assert (writing.log_prob, writing.mean_log_prob, writing.least_log_prob) == (-2, -1, -1.5)
    # An answer without a token has no mean, and the model was sure that there is nothing to say.
    empty = without_unsure(step, write_up(step, result((), "stop"), 7, tokenizer))
    assert (empty.text, empty.log_prob, empty.mean_log_prob) == ("", 0, None)


def test_a_stop_text_ends_the_answer_before_it(tokenizer: Tokenizer) -> None:
    step = GenerateStep(name="reply", stop=["END", "停"])
    writing = write_up(step, result(ids_of(tokenizer, "很好。停 and END"), "length"), 1, tokenizer)
    assert (writing.text, writing.finish_reason) == ("很好。", "stop")


@pytest.mark.parametrize("text", [" and then\n", "\n\n  x = 1\n", "ly", " ", "[[训练时间]] 😀"])
def test_a_continuation_keeps_every_blank(tokenizer: Tokenizer, text: str) -> None:
    prompt = "def f(x):"
    # In the middle of a text, where the tokenizer puts no blank of its own.
    ids = ids_of(tokenizer, prompt + text)[len(ids_of(tokenizer, prompt)) :]
    step = GenerateStep(name="code", chat=False)
    assert write_up(step, result(ids, "stop"), 1, tokenizer, chat=False).text == text
    cut = write_up(step, result(ids[:-1], "length"), 1, tokenizer, chat=False).text
    assert text.startswith(cut)


def test_a_stop_text_may_begin_a_continuation(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "a and then")[len(ids_of(tokenizer, "a")) :]
    step = GenerateStep(name="code", chat=False, stop=[" then"])
    assert write_up(step, result(ids, "stop"), 1, tokenizer, chat=False).text == " and"
    check = stop_at([" and"], tokenizer, continues=True)
    assert check is not None
    assert check(ids)


@pytest.mark.parametrize("character", ["é", "₿", "😀", "👩\u200d🚀", "🇩🇪", "\ufffd"])
def test_a_truncated_answer_has_no_partial_character(tokenizer: Tokenizer, character: str) -> None:
    step = GenerateStep(name="reply")
    whole = f"很好 {character}"
    ids = ids_of(tokenizer, whole)
    for count in range(1, len(ids) + 1):
        text = write_up(step, result(ids[:count], "length"), 1, tokenizer).text
        assert whole.startswith(text)
        # Cut after the complete character, nothing is dropped.
        assert (text == whole) == (count == len(ids))
    stopped = write_up(step, result(ids[:-1], "stop"), 1, tokenizer).text
    assert tokenizer.decode(ids[:-1]).strip() == stopped  # the model's own end is kept


@pytest.mark.parametrize(
    ("last", "dropped"),
    [
        ([0xF0, 0x9F], 2),
        ([0xF0, 0x9F, 0x98], 3),
        ([0xC3], 1),
        ([0x98], 0),  # no character begins with it
        ([0xF0, 0x9F, 0x41], 0),  # the model went on
        ([0xF0, 0x9F, 0xE4, 0xBD], 2),
        ([0xEF, 0xBF, 0xBD], 0),  # U+FFFD itself, written completely
    ],
)
def test_only_a_character_cut_by_the_limit_is_dropped(
    tokenizer: Tokenizer, last: list[int], dropped: int
) -> None:
    # The pieces <0x00> to <0xFF> follow three special ones.
    ids = [*ids_of(tokenizer, "很好"), *(3 + value for value in last)]
    text = write_up(GenerateStep(name="reply"), result(ids, "length"), 1, tokenizer).text
    assert text == tokenizer.decode(ids[: len(ids) - dropped])
    stopping = GenerateStep(name="reply", stop=["好"])
    assert write_up(stopping, result(ids, "length"), 1, tokenizer).text == "很"


def test_the_first_of_the_most_frequent_texts_is_elected() -> None:
    def drawn(*texts: str) -> Writing:
        return elect([Writing(text, "stop", 7, at, log_prob=at) for at, text in enumerate(texts)])

    assert drawn("a") == Writing("a", "stop", 7, 0, log_prob=0)
    vote = drawn("b", "a\n", "c", "a", "b", "")
    assert (vote.text, vote.completion_tokens, vote.log_prob) == ("b", 0, 0)
    assert (vote.agreement, vote.drawn_tokens) == (2 / 6, 15)
    assert vote.answers == ("b", "a\n", "c", "a", "b", "")
    vote = drawn("b", "a\n", "c", "a", "", " a")
    assert (vote.text, vote.completion_tokens, vote.agreement) == ("a\n", 1, 0.5)


class HalfBroken:
    """An engine that answers the last request first, and fails on every other one."""

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[GenerateResult]:
        asked = []
        for request in requests:
            asked += [request, *request.beside]
        for request in reversed(asked):
            if request.index % 2:
                yield GenerateResult(request.index, (), "error", "no memory")
            else:
                yield GenerateResult(request.index, (), "stop")

    def classify(self, requests: Iterable[ClassifyRequest]) -> Iterator[ClassifyResult]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to stop."""


def test_a_row_fails_once_if_a_draw_does(tokenizer: Tokenizer) -> None:
    steps = [(GenerateStep(name=f"reply{n}", temperature=1, n=n), True) for n in (1, 3)]
    rows = [[(0, b"a" * 16, Prompt("x", [5])), (1, b"b" * 16, Prompt("x", [5]))]]
    outcomes = list(ask_writings(steps, rows, HalfBroken(), tokenizer))
    assert [(number, key[:1]) for number, key, _ in outcomes] == [(1, b"b"), (0, b"a")]
    assert outcomes[0][2] == RowFault("model_failed", "no memory")
    assert outcomes[1][2] == Writing("", "stop", 1, 0)
