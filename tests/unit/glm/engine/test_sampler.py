"""The state of one request's sampling: its random numbers, and the ids that are penalized."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glmbatch.glm.engine.sampler import Uniforms


@given(seed=st.integers(0, 2**64 - 1))
def test_uniforms_depend_on_seed_and_index_only(seed: int) -> None:
    forward, backward = Uniforms(seed), Uniforms(seed)
    numbers = [forward.number(n) for n in range(130)]
    assert [backward.number(n) for n in reversed(range(130))] == numbers[::-1]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 130
    assert Uniforms(seed ^ 1).number(0) != numbers[0]


def test_uniforms_equal_those_of_earlier_releases() -> None:
    assert [Uniforms(7).number(n) * 2**32 for n in (0, 1, 64)] == [
        3745526968,
        1268584653,
        1130523808,
    ]
