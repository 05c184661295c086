"""The whole path of CUDA beside that of a CPU, over many rows: greedy, sampled and labels.

GLM_ROWS sets how many rows; 1,000 for acceptance, which takes a minute.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

from glmbatch.glm.engine.protocol import ClassifyRequest, GenerateRequest
from tests.unit.glm.cuda_on_cpu import on_cuda_path
from tests.unit.glm.tiny_glm import causal_model, engine_over, prompts

ROWS = int(os.environ.get("GLM_ROWS", "200"))
LABELS = ((5,), (5, 6), (7, 8, 9), (7, 8, 10), (11,))
TEMPLATE = [*range(20, 40)]

Answers = tuple[list[tuple[int, ...]], torch.Tensor]


def answers(model: Any, rows: int, **limits: int) -> Answers:
    """The ids of every row, greedy and sampled, and the scores of its labels."""
    rng = random.Random(3)
    scored, written = [], []
    for at, row in enumerate(prompts(rows, longest=30)):
        shared = at % 2 * len(TEMPLATE)
        ids = [*TEMPLATE, *row] if shared else row
        scored.append(ClassifyRequest(at, ids, LABELS, shared))
        tokens = rng.randint(1, 10)
        written.append(GenerateRequest(2 * at, ids, tokens, shared_tokens=shared))
        sampling: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "top_k": at % 3 * 10}
        written.append(
            GenerateRequest(2 * at + 1, ids, tokens, seed=at, shared_tokens=shared, **sampling)
        )
    with engine_over(model, **limits) as engine:
        texts = {result.index: result.ids for result in engine.generate(written)}
        scores = {result.index: result.scores for result in engine.classify(scored)}
    return [texts[at] for at in range(2 * rows)], torch.tensor([scores[at] for at in range(rows)])


def both(model: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Answers, Answers]:
    with on_cuda_path(monkeypatch) as recorder:
        on_cuda = answers(model, rows, max_slots=24, max_batch_tokens=300)
    assert recorder.replayed
    return answers(model, rows), on_cuda


def test_every_answer_is_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (texts, scores), (cuda_texts, cuda_scores) = both(causal_model(), ROWS, monkeypatch)
    assert cuda_texts == texts
    assert len(set(texts)) > ROWS
    torch.testing.assert_close(cuda_scores, scores, rtol=0, atol=2e-5)
    assert cuda_scores.argmax(1).equal(scores.argmax(1))


def test_bfloat16_differs_by_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_model().to(torch.bfloat16)
    (texts, scores), (cuda_texts, cuda_scores) = both(model, ROWS // 2, monkeypatch)
    equal = sum(one == other for one, other in zip(texts, cuda_texts, strict=True))
    same = int((cuda_scores.argmax(1) == scores.argmax(1)).sum())
    assert equal >= 0.97 * len(texts)
    assert same >= 0.97 * len(scores)
    torch.testing.assert_close(cuda_scores, scores, rtol=0, atol=0.1)
