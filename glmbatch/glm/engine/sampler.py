"""How one request chooses its next token: its settings, and what depends on its ids so far.

No tensors here: `next_tokens` applies what this says to the logits of a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glmbatch.glm.engine.protocol import FormState, GenerateRequest
from glmbatch.glm.model.sampling import IdArray, RowSampling


class Uniforms:
    """The uniform random numbers of one request, from a counter-based generator with its seed.

    The generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    Number n is always the same, so that a token is the same when it is drawn again after a failure.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed & (2**64 - 1))
        self._numbers: list[float] = []

    def number(self, n: int) -> float:
        """Number n, in [0, 1), a multiple of 2^-32."""
        while n >= len(self._numbers):
            # With 32 bits, a float64 sum times such a number stays below that sum.
            self._numbers += ((self._bits.random_raw(64) >> np.uint64(32)) * 2.0**-32).tolist()
        return self._numbers[n]


class Sampler:
    """The sampling settings of one request, and what its next token depends on so far."""

    def __init__(
        self, request: GenerateRequest, eos_id: int, writing: FormState | None = None
    ) -> None:
        self._request = request
        self._writing = writing
        self._eos_id = eos_id
        self._uniforms = Uniforms(request.seed)
        # Filled when the first token is chosen, because requests wait in thousands.
        self._penalized: _GrowingIds | None = None
        self._ngrams: _Ngrams | None = None

    @classmethod
    def of(
        cls, request: GenerateRequest, eos_id: int, writing: FormState | None = None
    ) -> Sampler | None:
        """The sampler of `request`, whose answer has the form `writing`; None if plain greedy."""
        plain = (
            writing is None
            and request.temperature == 0
            and request.repetition_penalty == 1
            and not request.no_repeat_ngram_size
            and not request.min_tokens
        )
        return None if plain else cls(request, eos_id, writing)

    def at(self, row: int, ids: Sequence[int]) -> RowSampling:
        """How to choose the token after all the generated `ids`, at `row` of a batch.

        The same for the same `ids`, so that a token is the same when it is chosen again.
        Between two calls, ids are only added. All of them must be there: read the last token first,
        while the device runs the forward whose token is chosen here.
        """
        request = self._request
        uniform = self._uniforms.number(len(ids)) if request.temperature > 0 else 0.0
        draw = RowSampling(row, request.temperature, request.top_k, request.top_p, uniform)
        if self._writing is not None:
            return draw._replace(allowed=self._writing.allowed())
        return draw._replace(
            repetition_penalty=request.repetition_penalty,
            penalized_ids=self._penalized_ids(ids) if request.repetition_penalty != 1 else None,
            barred_ids=self._barred_ids(ids),
        )

    def _penalized_ids(self, ids: Sequence[int]) -> IdArray:
        if self._penalized is None:
            self._penalized = _GrowingIds(self._request.prompt_ids)
        return self._penalized.with_answer(ids)

    def _barred_ids(self, ids: Sequence[int]) -> Sequence[int]:
        request = self._request
        barred: Sequence[int] = ()
        if request.no_repeat_ngram_size:
            if self._ngrams is None:
                self._ngrams = _Ngrams(request.no_repeat_ngram_size, request.prompt_ids)
            barred = self._ngrams.completions(ids)
        return (*barred, self._eos_id) if len(ids) < request.min_tokens else barred


class _GrowingIds:
    """The ids of a prompt and its answer as one array, which grows in place."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._array = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._prompt = self._used = len(self._array)

    def with_answer(self, ids: Sequence[int]) -> IdArray:
        """All ids, with those of the prompt once each."""
        used = self._prompt + len(ids)
        if used > len(self._array):
            self._array = np.resize(self._array, 2 * used)
        self._array[self._used : used] = ids[self._used - self._prompt :]
        self._used = used
        return self._array[:used]


class _Ngrams:
    """Which ids followed each run of n - 1 ids in a prompt and its answer."""

    def __init__(self, n: int, prompt_ids: Sequence[int]) -> None:
        self._before = n - 1
        self._followers: dict[tuple[int, ...], list[int]] = {}
        self._last: tuple[int, ...] = ()
        self._answered = 0
        self._add(prompt_ids)

    def completions(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids that would complete an n-gram that is already in the prompt or in `ids`."""
        self._add(ids[self._answered :])
        self._answered = len(ids)
        return self._followers.get(self._last, ())

    def _add(self, ids: Sequence[int]) -> None:
        for token in ids:
            if len(self._last) == self._before:
                self._followers.setdefault(self._last, []).append(token)
                self._last = (*self._last, token)[1:]
            else:
                self._last = (*self._last, token)
