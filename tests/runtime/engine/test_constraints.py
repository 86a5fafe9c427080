"""Allowed, banned and favoured tokens, penalties, min_tokens and guides, against plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.engine.base import SamplingParams
from runtime.engine.constraints import Constraints, GuideError, NoTokenError
from runtime.engine.penalties import Penalties
from runtime.engine.sampler import TokenSampler
from runtime.engine.workspace import Workspace

V = 10
tokens = st.integers(0, V - 1)


def greedy(**settings: object) -> SamplingParams:
    return SamplingParams(max_tokens=9, temperature=0, **settings)  # type: ignore[arg-type]


def choose(sampler: TokenSampler, logits: Sequence[float]) -> int:
    return sampler.choose(np.array(logits, np.float32), Workspace(len(logits))).token_id


RISING = [float(token) for token in range(V)]


@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({"allowed_token_ids": frozenset({2, 5})}, 5),
        ({"allowed_token_ids": frozenset({2, 5}), "banned_token_ids": frozenset({5})}, 2),
        ({"banned_token_ids": frozenset({9, 8})}, 7),
        ({"logit_bias": {3: 6.5}}, 3),
        ({"logit_bias": {9: -100.0, 8: -100.0}}, 7),
        ({"logit_bias": {3: 100.0}, "banned_token_ids": frozenset({3})}, 9),
        ({"logit_bias": {3: 100.0}, "allowed_token_ids": frozenset({1})}, 1),
        ({"min_tokens": 1, "stop_token_ids": frozenset({9})}, 8),
        ({"min_tokens": 0, "stop_token_ids": frozenset({9})}, 9),
        ({"min_tokens": 1, "stop_token_ids": frozenset({9, 5000})}, 8),  # an end token that the model has not
    ],
)
def test_single_tokens(settings: dict[str, object], token: int) -> None:
    sampler = TokenSampler(greedy(**settings), (1, 2))
    assert sampler.greedy == (settings.get("min_tokens") == 0)
    assert choose(sampler, RISING) == token


def test_min_tokens_hold_only_so_long() -> None:
    sampler = TokenSampler(greedy(min_tokens=2, stop_token_ids=frozenset({9})), (1,))
    assert [choose(sampler, RISING) for _ in range(3)] == [8, 8, 9]
    assert sampler.greedy, "from then on the row is not needed"


def test_no_token_is_left() -> None:
    sampler = TokenSampler(greedy(min_tokens=1, stop_token_ids=frozenset(range(V))), (1, 2))
    with pytest.raises(NoTokenError, match="no token may come at position 2"):
        choose(sampler, RISING)


@given(
    logits=st.lists(st.floats(-9, 9, width=32), min_size=V, max_size=V),
    prompt=st.lists(tokens, min_size=1, max_size=6),
    output=st.lists(tokens, max_size=90),
    repetition=st.floats(0.1, 3),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_penalties(
    logits: list[float], prompt: list[int], output: list[int], repetition: float, frequency: float, presence: float
) -> None:
    sampling = greedy(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    expected = list(logits)
    for token in range(V):
        if token in prompt or token in output:
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        expected[token] -= frequency * output.count(token) + presence * (token in output)
    penalties = Penalties(sampling, prompt)
    for token in output:
        penalties.push(token)
    logits_V = np.array(logits, np.float32)
    penalties.apply(logits_V)
    np.testing.assert_allclose(logits_V, expected, rtol=1e-5, atol=2e-4)


def test_penalties_of_many_tokens() -> None:
    """More distinct tokens than there was room for at first."""
    output = np.random.default_rng(0).integers(0, 1000, 3000)
    penalties = Penalties(greedy(frequency_penalty=0.5), (1, 2))
    for token in output.tolist():
        penalties.push(token)
    logits_V = np.zeros(1000, np.float32)
    penalties.apply(logits_V)
    np.testing.assert_array_equal(logits_V, -0.5 * np.bincount(output, minlength=1000))


def test_the_sampler_counts_what_it_chose() -> None:
    sampler = TokenSampler(greedy(frequency_penalty=1.5), (9,))
    assert [choose(sampler, RISING) for _ in range(4)] == [9, 8, 9, 7]
    assert sampler.generated == [9, 8, 9, 7]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"frequency_penalty": -1}, True),
        ({"presence_penalty": 1}, True),
    ],
)
def test_whether_penalties_are_wanted(settings: dict[str, float], wanted: bool) -> None:
    assert Penalties.wanted(greedy(**settings)) == wanted


class OnlyEven:
    """A guide after which each token is even, and larger than the one before."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def allowed(self, token_ids: Sequence[int]) -> NDArray[np.bool_] | None:
        self.asked.append(list(token_ids))
        if not token_ids:
            return None
        ids = np.arange(V)
        mask: NDArray[np.bool_] = (ids % 2 == 0) & (ids > token_ids[-1])
        return mask


def test_a_guide_leads() -> None:
    guide = OnlyEven()
    sampler = TokenSampler(greedy(guide=guide, logit_bias={7: 5.0}), (1, 2, 3))
    falling = RISING[::-1]
    assert choose(sampler, falling) == 0
    assert [choose(sampler, falling) for _ in range(3)] == [2, 4, 6]
    assert guide.asked == [[], [0], [0, 2], [0, 2, 4]]
    assert choose(sampler, falling) == 8
    with pytest.raises(NoTokenError, match="no token may come at position 8"):
        choose(sampler, falling)


class Wrong:
    def __init__(self, mask: object) -> None:
        self.mask = mask

    def allowed(self, token_ids: Sequence[int]) -> object:
        if isinstance(self.mask, Exception):
            raise self.mask
        return self.mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (KeyError("state"), "the guide failed with KeyError: 'state'"),
        (np.ones(V - 1, np.bool_), r"the guide gave bool \[9\]; it must give bool \[10\]"),
        (np.ones(V, np.int32), r"the guide gave int32 \[10\]"),
    ],
)
def test_a_guide_that_fails(mask: object, message: str) -> None:
    sampling = greedy(guide=Wrong(mask))
    with pytest.raises(GuideError, match=message):
        Constraints(sampling).apply(np.zeros(V, np.float32), [])
