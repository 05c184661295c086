"""How one request chooses its next token: its settings, and what depends on its ids so far.

No tensors here: `next_tokens` applies what this says to the logits of a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.model.sampling import RowSampling


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

    def __init__(self, request: GenerateRequest, eos_id: int) -> None:
        self._eos_id = eos_id
        self._request = request
        self._uniforms = Uniforms(request.seed)

    @classmethod
    def of(cls, request: GenerateRequest, eos_id: int) -> Sampler | None:
        """The sampler of `request`; None if it is plain greedy."""
        return cls(request, eos_id) if request.temperature > 0 else None

    def at(self, row: int, ids: Sequence[int]) -> RowSampling:
        """How to choose the token after all the generated `ids`, at `row` of a batch.

        The same for the same `ids`, so that a token is the same when it is chosen again.
        Between two calls, ids are only added. All of them must be there: read the last token first,
        while the device runs the forward whose token is chosen here.
        """
        request = self._request
        uniform = self._uniforms.number(len(ids))
        return RowSampling(row, request.temperature, request.top_k, request.top_p, uniform)
