"""The sampler against independent computations, and its promises about seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.engine.base import SamplingParams
from runtime.engine.sampler import LogitsError, sample

DRAWS = 20_000


def params(**settings: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **settings)  # type: ignore[arg-type]


def random_logits(size: int = 12) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1.5, size).astype(np.float32)


def counts(logits_V: NDArray[np.float32], **settings: float) -> NDArray[np.int64]:
    drawn = [sample(logits_V, params(seed=7, **settings), position) for position in range(DRAWS)]
    return np.bincount(drawn, minlength=len(logits_V))


def nucleus(probabilities: list[float], top_p: float) -> list[float]:
    """Plain Python: add the likeliest token until the sum reaches top_p, then renormalize."""
    kept = [0.0] * len(probabilities)
    for token in sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token)):
        kept[token] = probabilities[token]
        if math.fsum(kept) >= top_p:
            break
    return [p / math.fsum(kept) for p in kept]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.05])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_distribution_is_softmax_cut_to_the_nucleus(temperature: float, top_p: float) -> None:
    logits_V = random_logits()
    softmax = torch.softmax(torch.from_numpy(logits_V).double() / temperature, 0).tolist()
    expected = DRAWS * np.array(nucleus(softmax, top_p))
    observed = counts(logits_V, temperature=temperature, top_p=top_p)
    assert observed[expected == 0].sum() == 0
    likely = expected > 5
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    # Mean f and variance 2f for f degrees of freedom: five deviations away is no chance.
    freedom = max(int(likely.sum()) - 1, 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=50), st.floats(0.01, 1), st.integers(0, 2**63))
def test_only_tokens_of_the_nucleus_are_drawn(values: list[float], top_p: float, seed: int) -> None:
    logits_V = np.array(values, np.float32)
    softmax = torch.softmax(torch.from_numpy(logits_V).double(), 0).tolist()
    token = sample(logits_V, params(top_p=top_p, seed=seed), position=3)
    # A hair of slack: two correct sums may disagree on which token reaches top_p.
    assert nucleus(softmax, min(top_p + 1e-9, 1.0))[token] > 0


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id() -> None:
    assert sample(np.array([0, 3, 1, 3], np.float32), params(temperature=0), 0) == 1


@pytest.mark.parametrize("temperature", [1e-9, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits_V = np.array([-3e38, 1.0, 3e38, 2.9e38], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert {sample(logits_V, params(temperature=temperature), position) for position in range(50)} == {2}


def test_a_huge_temperature_is_uniform() -> None:
    observed = counts(np.array([-3e38, 0, 3e38], np.float32), temperature=1e300)
    assert observed.min() > DRAWS / 3 * 0.95


def test_negative_infinity_excludes_a_token() -> None:
    observed = counts(np.array([0, -np.inf, 0, -np.inf], np.float32))
    assert observed[[1, 3]].sum() == 0
    assert observed.sum() == DRAWS


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logits", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf, -np.inf], [np.nan, np.inf]])
def test_unusable_logits_are_an_error(logits: list[float], temperature: float) -> None:
    with pytest.raises(LogitsError, match="position 5"):
        sample(np.array(logits, np.float32), params(temperature=temperature), 5)


def test_the_stream_depends_on_seed_and_position_only() -> None:
    logits_V = np.zeros(1000, np.float32)
    forward = [sample(logits_V, params(seed=1), position) for position in range(50)]
    backward = [sample(logits_V, params(seed=1), position) for position in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != [sample(logits_V, params(seed=2), position) for position in range(50)]
    assert len(set(forward)) > 40


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert 0 <= sample(random_logits(), params(seed=seed), 0) < 12


def test_seeds_and_positions_are_independent() -> None:
    """The streams of neighbouring seeds share nothing, not even when positions are shifted against each other."""
    logits_V = np.zeros(2, np.float32)
    bits = np.array([[sample(logits_V, params(seed=s), p) for p in range(400)] for s in range(8)])
    correlations = np.corrcoef(bits)[np.triu_indices(8, 1)]
    shifted = [np.corrcoef(bits[s, 1:], bits[s + 1, :-1])[0, 1] for s in range(7)]
    assert np.abs([*correlations, *shifted]).max() < 5 / math.sqrt(400)
