"""Questions about one text, read together, have the scores that each has alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

from glmbatch.glm.engine.classify import read_together
from glmbatch.glm.engine.protocol import ClassifyRequest, ClassifyResult
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.glm.model.network import Network
from tests.unit.glm.cuda_on_cpu import on_cuda_path
from tests.unit.glm.engine.test_worker import full_above
from tests.unit.glm.tiny_glm import (
    EOS,
    NOT_A_NUMBER,
    POSITIONS,
    TOKENS,
    Labels,
    causal_model,
    classified,
    engine_over,
    head_model,
)

# One question ends where the text does, two begin alike, and labels differ and repeat.
ENDINGS = ((), (40, 41, 42), (40, 41, 43, 44), (50,), (60, 61))
LABELS: tuple[Labels, ...] = (
    ((5,), (5, 6), (40, 41, 9)),
    ((5,), (6,)),
    ((7, 8, 9), (7, 8, 10), (11,)),
    ((5, 6), (7,)),
    ((12,), (13, 14, 15, 16)),
)


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(64, TOKENS, (length,), generator=generator).tolist()
    return ids


def questions(text: list[int], at: int, *, head: bool, shared: int = 0) -> list[ClassifyRequest]:
    """Five questions about `text`, the row number `at`."""
    asked = []
    for number, (ending, labels) in enumerate(zip(ENDINGS, LABELS, strict=True)):
        ids = [*text, *ending]
        index = at * len(ENDINGS) + number
        asked.append(ClassifyRequest(index, ids, None if head else labels, shared))
    return asked


def together(asked: list[ClassifyRequest]) -> ClassifyRequest:
    return replace(asked[0], beside=tuple(asked[1:]))


def assert_equal(one: dict[int, ClassifyResult], other: dict[int, ClassifyResult]) -> None:
    assert one.keys() == other.keys()
    for index, result in one.items():
        assert result.error == other[index].error
        scores = softmax(result.scores)
        assert scores == pytest.approx(softmax(other[index].scores), abs=1e-6, rel=0)


def softmax(scores: Sequence[float]) -> list[float]:
    return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist() if scores else []


@pytest.fixture(params=[False, True], ids=["spans", "flash"])
def path(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines attend as on CPU, then as on CUDA."""
    with on_cuda_path(monkeypatch) if request.param else nullcontext():
        yield


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("prefix_places", "shared", "budget"), [(0, 0, 2048), (5, 18, 100)])
@pytest.mark.parametrize("head", [False, True])
def test_questions_together_score_as_each_alone(
    head: bool, prefix_places: int, shared: int, budget: int
) -> None:
    model = head_model(prefix_places) if head else causal_model(prefix_places)
    template = text(shared, seed=1)
    rows = []
    for at in range(9):
        rows.append(questions([*template, *text(17 + 4 * at)], at, head=head, shared=shared))
    # Some of a row are known already, so rows differ in what is asked.
    some = [row[at % 3 :] for at, row in enumerate(rows)]
    with engine_over(model, max_batch_tokens=budget) as engine:
        alone = classified(engine, list(chain(*rows)))
        assert_equal(classified(engine, list(map(together, rows))), alone)
        of_some = classified(engine, list(map(together, some)))
    assert len(of_some) == sum(map(len, some))
    assert_equal(of_some, {index: alone[index] for index in of_some})


def test_the_text_is_read_once_for_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [together(questions(text(100, seed=at), at, head=False)) for at in range(3)]
    read: list[int] = []
    prefill = Network.prefill

    def counted(network: Network, rows: Any, prefix: Any) -> Any:
        read.append(sum(map(len, rows)))
        return prefill(network, rows, prefix)

    monkeypatch.setattr(Network, "prefill", counted)
    with engine_over(causal_model()) as engine:
        assert len(classified(engine, asked)) == 3 * len(ENDINGS)
    assert sum(read) < 3 * 125


def groups_of(asked: list[ClassifyRequest]) -> list[list[int]]:
    groups = read_together(together(asked))
    return [[question.index for question in group.questions] for group in groups]


def test_only_questions_that_begin_alike_are_read_together() -> None:
    shared = text(60, seed=2)
    asked = [
        ClassifyRequest(0, [*shared, 5], LABELS[0]),
        ClassifyRequest(1, [9, *shared], LABELS[0]),
        ClassifyRequest(2, [*shared, 6], LABELS[0]),
        ClassifyRequest(3, [9, *shared, 7], LABELS[0]),
        ClassifyRequest(4, [*shared, *range(20, 80)] * 20, LABELS[0]),
    ]
    groups = groups_of(asked)
    assert groups == [[0, 2], [1, 3], [4]]
    # A text of 60 tokens saves less than 400 behind it cost.
    asked = [
        ClassifyRequest(0, [*shared, *[6] * 400, 5], LABELS[0]),
        ClassifyRequest(1, [*shared, 7], LABELS[0]),
        ClassifyRequest(2, [*shared, *[6] * 400, *[8] * 300], LABELS[0]),
    ]
    groups = groups_of(asked)
    assert groups == [[0, 2], [1]]
    # A long text is worth it, up to a limit.
    long = text(500, seed=3)
    for behind, expected in ((400, [[0, 1]]), (600, [[0], [1]])):
        asked = [ClassifyRequest(at, [*long, *[7 + at] * behind], LABELS[0]) for at in range(2)]
        assert groups_of(asked) == expected
    # The template before the text is cached, so sharing it alone saves nothing.
    asked = [ClassifyRequest(at, [*shared, at], LABELS[0], shared_tokens=60) for at in range(3)]
    assert len(read_together(together(asked))) == 3


@pytest.mark.usefixtures("path")
def test_rows_with_trees_of_their_own_share_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for at in range(6):
        begin, own = text(60, seed=at), text(5 + at % 3, seed=90 + at)
        for number, labels in enumerate(LABELS):
            ids = [*begin, 40 + number, *own]
            asked.append(ClassifyRequest(5 * at + number, ids, labels))
    rows = [together(asked[first : first + 5]) for first in range(0, 30, 5)]
    batches: list[int] = []
    prefill = Network.prefill

    def counted(network: Network, prompts: Any, prefix: Any) -> Any:
        batches.append(len(prompts))
        return prefill(network, prompts, prefix)

    with engine_over(causal_model()) as engine:
        alone = classified(engine, asked)
        monkeypatch.setattr(Network, "prefill", counted)
        assert_equal(classified(engine, rows), alone)
    assert max(batches) > 1


def test_an_invalid_question_fails_alone() -> None:
    asked = questions(text(40), 0, head=False)
    asked[0] = replace(asked[0], label_ids=((5,), ()))
    asked[3] = replace(asked[3], prompt_ids=[*asked[3].prompt_ids, *[5] * POSITIONS])
    with engine_over(causal_model()) as engine:
        answers = classified(engine, [together(asked)])
        alone = classified(engine, [asked[1], asked[2], asked[4]])
        nothing = classified(engine, [together([asked[0], asked[3]])])
    assert "has no tokens" in (answers.pop(0).error or "")
    assert "positions" in (answers.pop(3).error or "")
    assert_equal(answers, alone)
    assert nothing.keys() == {0, 3}


def test_a_question_without_finite_scores_fails_alone() -> None:
    asked = questions(text(40), 0, head=False)
    asked[3] = replace(asked[3], prompt_ids=[*asked[3].prompt_ids, NOT_A_NUMBER])
    with engine_over(causal_model()) as engine:
        answers = classified(engine, [together(asked)])
        alone = classified(engine, [*asked[:3], asked[4]])
    assert "not finite" in (answers.pop(3).error or "")
    assert_equal(answers, alone)


def test_questions_too_large_together_are_asked_one_by_one() -> None:
    asked = []
    for at in range(5):
        asked.append(ClassifyRequest(at, [*text(60), *text(30, seed=7 + at)], LABELS[at]))
    with engine_over(causal_model()) as engine:
        alone = classified(engine, asked)
    engine = TorchEngine(full_above(causal_model(), tokens=70), eos_id=EOS, token_count=TOKENS)
    assert_equal(classified(engine, [together(asked)]), alone)
    engine.close()


def test_a_cancelled_call_is_not_answered() -> None:
    asked = [together(questions(text(60, seed=at), at, head=False)) for at in range(40)]
    with engine_over(causal_model(), max_batch_tokens=100) as engine:
        answers: Any = engine.classify(asked)
        next(answers)
        answers.close()
        (own,) = engine.classify([questions(text(60), 0, head=False)[0]])
    assert own.error is None
