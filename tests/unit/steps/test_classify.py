"""Scores of whole labels sum to one, ignore the order, and allow for labels that begin others."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from glmbatch.errors import InputError
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.steps.classify import (
    choose,
    choose_by_likelihood,
    encode_labels,
    select,
    verdict_odds,
)
from tests.support import CAUSAL

SCORES = st.lists(st.floats(-50, 50), min_size=2, max_size=8)


@given(SCORES)
def test_scores_sum_to_one_and_the_label_has_the_highest(log_weights: list[float]) -> None:
    labels = [f"label {index}" for index in range(len(log_weights))]
    choice = choose(labels, log_weights)
    assert math.isclose(math.fsum(choice.scores.values()), 1, abs_tol=1e-12)
    assert choice.scores[choice.label] == max(choice.scores.values())
    assert 0 <= choice.margin <= 1


@given(SCORES, st.randoms())
def test_the_order_of_labels_changes_no_bit(log_weights: list[float], random: object) -> None:
    labels = [f"label {index}" for index in range(len(log_weights))]
    pairs = list(zip(labels, log_weights, strict=True))
    random.shuffle(pairs)  # type: ignore[attr-defined]
    assert choose(*map(list, zip(*pairs, strict=True))) == choose(labels, log_weights)


def test_a_longer_label_can_win_over_its_own_beginning() -> None:
    labels, ids = ["good", "good enough", "good enough yet", "bad"], [(1,), (1, 2), (1, 2, 3), (4,)]
    # Of all answers that begin with "good" (0.6), 5 in 6 continue to "good enough", and 1 in 5 of
    # these to "yet".
    choice = choose_by_likelihood(labels, ids, [math.log(p) for p in (0.6, 0.5, 0.1, 0.2)])
    assert choice.label == "good enough"
    expected = dict(zip(labels, (0.1, 0.4, 0.1, 0.2), strict=True))
    assert {name: round(score * 0.8, 12) for name, score in choice.scores.items()} == expected


def test_rounding_beyond_the_whole_gives_a_zero_score() -> None:
    choice = choose_by_likelihood(["a", "ab", "c"], [(1,), (1, 2), (3,)], [-1.0, -0.9999999, -2.0])
    assert choice.scores["a"] == 0


def test_labels_without_a_common_prefix_get_a_softmax() -> None:
    likelihoods = [-1.0, -2.5, -3.0]
    assert choose_by_likelihood(["a", "b", "c"], [(1, 9), (2,), (3,)], likelihoods) == choose(
        ["a", "b", "c"], likelihoods
    )


def test_labels_with_the_same_tokens_are_refused() -> None:
    assert len(set(encode_labels(["A", "Ａ", "A "], load_tokenizer(CAUSAL)))) == 3
    widths_alike = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["A B C"] * 9),
        model_writer=widths_alike,
        vocab_size=264,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    tokenizer = Tokenizer(SentencePieceProcessor(model_proto=widths_alike.getvalue()))
    with pytest.raises(InputError, match="labels 'A' and 'Ａ' are the same tokens"):
        encode_labels(["A", "Ａ"], tokenizer)


@given(SCORES.filter(lambda scores: len(scores) % 2 == 0))
def test_each_label_is_judged_by_its_own_verdicts(log_weights: list[float]) -> None:
    labels = [f"label {index}" for index in range(len(log_weights) // 2)]
    thresholds = {label: 0.2 + 0.1 * index for index, label in enumerate(labels)}
    selection = select(labels, verdict_odds(log_weights), thresholds)
    for index, label in enumerate(labels):
        verdicts = choose(["yes", "no"], log_weights[2 * index : 2 * index + 2])
        assert selection.scores[label] == pytest.approx(verdicts.scores["yes"], abs=1e-12)
        assert (label in selection.answer) == (selection.scores[label] >= thresholds[label])
    assert selection.answer == sorted(selection.answer)
    assert 0 <= selection.score <= 1
    assert 0 <= selection.margin <= 1


def test_several_labels_score_as_their_least_certain_verdict() -> None:
    log_weights = [math.log(p) for p in (0.9, 0.1, 0.3, 0.7, 0.05, 0.95)]
    selection = select(["a", "b", "c"], verdict_odds(log_weights), {"a": 0.5, "b": 0.25, "c": 0.5})
    assert selection.answer == ["a", "b"]
    assert selection.score == pytest.approx(0.3)
    assert selection.margin == pytest.approx(0.05)
    assert select(["a"], [-1e4], {"a": 0.5}).scores == {"a": 0.0}


def test_labels_may_be_compared_by_the_mean_of_their_tokens() -> None:
    labels, ids = ["no", "yes, in full"], [(1,), (2, 3, 4, 5)]
    likelihoods = [math.log(0.3), math.log(0.2)]
    assert choose_by_likelihood(labels, ids, likelihoods).label == "no"
    by_mean = choose_by_likelihood(labels, ids, likelihoods, by_mean=True)
    assert by_mean == choose(labels, [math.log(0.3), math.log(0.2) / 4])
    assert by_mean.label == "yes, in full"


def test_a_prior_is_divided_out() -> None:
    labels, ids = ["good", "good enough", "bad"], [(1,), (1, 2), (3,)]
    row = [math.log(p) for p in (0.6, 0.2, 0.3)]
    before = [math.log(p) for p in (0.9, 0.1, 0.1)]
    choice = choose_by_likelihood(labels, ids, row, prior=before)
    expected = choose(labels, [math.log(p) for p in (0.4 / 0.8, 0.2 / 0.1, 0.3 / 0.1)])
    assert choice.scores == pytest.approx(expected.scores, abs=1e-12)
    assert choice.label == "bad"
    # Behind its own prior, no label is likelier than another.
    even = choose_by_likelihood(labels, ids, before, prior=before)
    assert even.scores == pytest.approx(dict.fromkeys(labels, 1 / 3), abs=1e-12)


def test_a_prior_of_zero_keeps_scores_finite() -> None:
    labels, ids = ["a", "ab", "c"], [(1,), (1, 2), (3,)]
    choice = choose_by_likelihood(labels, ids, [-1.0, -1.5, -2.0], prior=[-1.0, -0.9999999, -2.0])
    assert all(0 < score < 1 for score in choice.scores.values())
