"""Answers in a form: what is forced, dropped and chosen is as in a loop over whole sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from glmbatch.glm.engine.protocol import Advance, GenerateRequest, GenerateResult
from tests.unit.glm.cuda_on_cpu import on_cuda_path
from tests.unit.glm.tiny_glm import (
    POSITIONS,
    TOKENS,
    causal_model,
    engine_over,
    plain_logits,
    prompts,
)

PLACE_BYTES = 2 * 3 * 2 * 16 * 4


class Scripted:
    """Allows a third of the tokens in turn; after some it forces ids, after others drops some."""

    longest = 60

    def __init__(self, number: int) -> None:
        self._number = number

    def begin(self) -> _State:
        return _State(self._number)


class _State:
    def __init__(self, number: int) -> None:
        self._number = number
        self._chosen = 0
        self.was_cut = number % 2 == 1

    def begin(self) -> Sequence[int]:
        return (7, 8, 9)[: self._number % 4]

    def allowed_ids(self) -> list[int]:
        return [token for token in range(3, TOKENS) if (token + self._chosen) % 3 == 0]

    def allowed(self) -> bytes:
        bits = bytearray(TOKENS // 8 + 1)
        for token in self.allowed_ids():
            bits[token // 8] |= 1 << token % 8
        return bytes(bits)

    def advance(self, token: int) -> Advance:
        self._chosen += 1
        if self._number == 13 and self._chosen == 5:
            raise ValueError("it is 13")
        if self._chosen == 12:
            return Advance(0, (20,), ended=True)
        script = {2: Advance(0, (10, 11, 12)), 5: Advance(5, (13, 14)), 6: Advance(0, (15,))}
        return script.get(self._chosen, Advance())


def plain(model: Any, prompt: Sequence[int], number: int) -> tuple[list[int], list[float]]:
    """The answer from a forward over the whole sequence for each chosen token.

    Also the log-probability of each of its ids among the allowed ones; nan where it was forced.
    """
    state = _State(number)
    ids = [*prompt, *state.begin()]
    log_probs = [math.nan] * (len(ids) - len(prompt))
    ended = False
    while not ended:
        allowed = torch.tensor(state.allowed_ids())
        of_allowed = plain_logits(model, ids)[-1][allowed].log_softmax(-1)
        best = int(of_allowed.argmax())
        log_probs.append(float(of_allowed[best]))
        ids.append(int(allowed[best]))
        dropped, forced, ended = state.advance(ids[-1])
        ids = [*ids[: len(ids) - dropped], *forced]
        log_probs = [*log_probs[: len(log_probs) - dropped], *[math.nan] * len(forced)]
    return ids[len(prompt) :], log_probs


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("slots", "budget", "places"),
    # Few places: sequences are preempted and read again.
    [(1, 16, 2048), (5, 40, 2048), (32, 2048, 4096), (8, 64, 160)],
)
def test_forced_and_dropped_ids_are_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, ahead: bool, slots: int, budget: int, places: int
) -> None:
    model = causal_model()
    requests = []
    for at, row in enumerate(prompts(10, longest=40)):
        form = None if at % 5 == 4 else Scripted(at)
        asks = at % 2 == 0
        requests.append(GenerateRequest(at, row, 60 if form else 9, form=form, log_probs=asks))
    with (
        on_cuda_path(monkeypatch) if ahead else nullcontext(),
        engine_over(
            model, max_slots=slots, max_batch_tokens=budget, cache_bytes=places * PLACE_BYTES
        ) as engine,
    ):
        results = {result.index: result for result in engine.generate(requests)}
    for request in requests:
        result = results[request.index]
        if request.form is None:
            assert result.forced == 0 and len(result.ids) <= 9
            continue
        ids, log_probs = plain(model, request.prompt_ids, request.index)
        assert list(result.ids) == ids
        expected = log_probs if request.log_probs else []
        assert result.log_probs == pytest.approx(tuple(expected), abs=1e-4, nan_ok=True)
        assert result.finish_reason == ("length" if request.index % 2 else "stop")
        # Two of the forced ids are dropped again.
        assert result.forced == request.index % 4 + 5


def test_a_form_that_cannot_go_on_fails_its_row_alone() -> None:
    requests = [GenerateRequest(at, [5, 6], 60, form=Scripted(at)) for at in (12, 13, 14)]
    with engine_over(causal_model()) as engine:
        results = {result.index: result for result in engine.generate(requests)}
    fault = "the form of the answer cannot go on: it is 13"
    assert results[13] == GenerateResult(13, (), "error", fault)
    assert results[12].error is None and results[14].error is None


def test_a_prompt_without_room_for_its_form_is_refused() -> None:
    rows = [[5] * (POSITIONS - 60), [5] * (POSITIONS - 59)]
    requests = [GenerateRequest(at, row, 60, form=Scripted(0)) for at, row in enumerate(rows)]
    with engine_over(causal_model()) as engine:
        results = {result.index: result for result in engine.generate(requests)}
    assert results[0].error is None
    assert "and its answer up to 60; the model has 256 positions" in (results[1].error or "")
