"""The sampler against independent computations, and its promises about seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.engine.base import SamplingParams
from runtime.engine.distribution import draw
from runtime.engine.logprobs import LogitsError
from runtime.engine.sampler import TokenSampler
from runtime.engine.top_k import largest
from runtime.engine.workspace import Workspace

DRAWS = 3000


def params(**settings: object) -> SamplingParams:
    return SamplingParams(max_tokens=1, **settings)  # type: ignore[arg-type]


def sample(logits_V: NDArray[np.float32], sampling: SamplingParams, position: int, child: int = 0) -> int:
    """The first token after a prompt of `position` tokens."""
    return TokenSampler(sampling, (0,) * position, child).choose(logits_V, Workspace(len(logits_V))).token_id


def random_logits(size: int = 12) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1.5, size).astype(np.float32)


def counts(logits_V: NDArray[np.float32], **settings: object) -> NDArray[np.int64]:
    sampler, work = TokenSampler(params(seed=7, **settings), ()), Workspace(len(logits_V))
    drawn = [sampler.choose(logits_V, work).token_id for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=len(logits_V))


def narrowed(logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Plain Python after vLLM: min_p of the likeliest, the top_k, then tokens until the sum reaches top_p."""
    softmax = torch.softmax(torch.from_numpy(logits).double() / temperature, 0).tolist()
    kept = [p if p >= min_p * max(softmax) else 0.0 for p in softmax]
    if top_k:
        kept = [p if p >= sorted(kept)[-top_k] else 0.0 for p in kept]
    total, reached, nucleus = math.fsum(kept), 0.0, [0.0] * len(kept)
    # Logits that differ may have the same probability.
    for token in sorted(range(len(kept)), key=lambda token: (-kept[token], -logits[token], token)):
        nucleus[token] = kept[token]
        reached += kept[token]
        if reached >= top_p * total:
            break
    return [p / math.fsum(nucleus) for p in nucleus]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_p": 0.9},
        {"top_p": 0.6},
        {"top_p": 0.05},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 500},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.7, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_distribution_is_the_narrowed_softmax(temperature: float, settings: dict[str, float]) -> None:
    logits_V = random_logits()
    wanted = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    wanted["top_k"] = min(wanted["top_k"], len(logits_V))
    expected = DRAWS * np.array(narrowed(logits_V, temperature, **wanted))  # type: ignore[arg-type]
    observed = counts(logits_V, temperature=temperature, **settings)
    assert observed[expected == 0].sum() == 0
    likely = expected > 5
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    # Mean f and variance 2f for f degrees of freedom: five deviations away is no chance.
    freedom = max(int(likely.sum()) - 1, 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@example([0.0, 1e-20], 0.25, 0, 0.0, 0)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=700),
    st.floats(0.01, 1),
    st.integers(0, 20),
    st.floats(0, 1),
    st.integers(0, 2**63),
)
def test_only_tokens_that_are_kept_are_drawn(
    values: list[float], top_p: float, top_k: int, min_p: float, seed: int
) -> None:
    logits_V = np.array(values, np.float32)
    token = sample(logits_V, params(top_p=top_p, top_k=top_k, min_p=min_p, seed=seed), position=3)
    # A hair of slack: two correct sums may disagree on which token reaches top_p, and which is as likely as min_p says.
    slack = narrowed(logits_V, 1.0, min(top_k, len(values)), min(top_p + 1e-6, 1.0), min_p * (1 - 1e-6))
    assert slack[token] > 0


@pytest.mark.parametrize("spread", [0.01, 1.0, 12.0])
def test_a_large_vocabulary(spread: float) -> None:
    """Runs, groups and bins are what they are for small ones; the nucleus has exactly the tokens that it must."""
    logits_V = np.random.default_rng(1).normal(0, spread, 20_011).astype(np.float32)
    weights = np.sort(torch.softmax(torch.from_numpy(logits_V).double(), 0).numpy())[::-1].cumsum()
    least = np.sort(logits_V)[::-1][np.searchsorted(weights, 0.7)]
    sampler, work = TokenSampler(params(top_p=0.7), ()), Workspace(len(logits_V))
    drawn = np.array([sampler.choose(logits_V, work).token_id for _ in range(1500)])
    assert logits_V[drawn].min() >= least - 1e-4
    # Of the nucleus, the rarer half of the mass comes as often as the likelier half.
    middle = np.sort(logits_V)[::-1][np.searchsorted(weights, 0.35)]
    if spread < 10:  # there, single tokens have too much of it
        assert abs((logits_V[drawn] < middle).mean() - 0.5) < 5 * 0.5 / math.sqrt(1500)


def test_the_largest_number_falls_on_a_token_that_may_come() -> None:
    """Also where two ways of summing the same weights disagree in their last bits, which is so for a few of these."""
    random = np.random.default_rng(0)
    for size in range(300, 9000, 29):
        logits_V = np.sort(random.normal(0, 9, size)).astype(np.float32)
        highest, logits_V[-40:] = logits_V[-41], -np.inf
        token = draw(logits_V, highest, params(), 1 - 2.0**-53, Workspace(size))
        assert np.isfinite(logits_V[token])


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=400), st.integers(1, 450))
def test_the_largest(values: list[int], k: int) -> None:
    x_V = np.array(values, np.float32)
    kth = sorted(values, reverse=True)[min(k, len(values)) - 1]
    assert largest(x_V, k).tolist() == [i for i, value in enumerate(values) if value >= kth]


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id() -> None:
    assert sample(np.array([0, 3, 1, 3], np.float32), params(temperature=0), 0) == 1


@pytest.mark.parametrize("temperature", [1e-9, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits_V = np.array([-3e38, 1.0, 3e38, 2.9e38], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert {sample(logits_V, params(temperature=temperature), position) for position in range(50)} == {2}


def test_a_huge_temperature_is_uniform() -> None:
    observed = counts(np.array([-3e38, 0, 3e38], np.float32), temperature=1e300)
    assert observed.min() > DRAWS / 3 * 0.9


def test_negative_infinity_excludes_a_token() -> None:
    for narrowing in ({}, {"top_k": 3}, {"top_p": 1 - 1e-16}, {"min_p": 1e-30}):
        observed = counts(np.array([0, -np.inf, 0, -np.inf], np.float32), **narrowing)
        assert observed[[1, 3]].sum() == 0
        assert observed.sum() == DRAWS


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logits", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf, -np.inf], [np.nan, np.inf]])
def test_unusable_logits_are_an_error(logits: list[float], temperature: float) -> None:
    with pytest.raises(LogitsError, match="position 5"):
        sample(np.array(logits, np.float32), params(temperature=temperature), 5)
    # Also where a constraint would hide what is wrong.
    with pytest.raises(LogitsError, match="position 5"):
        sample(np.array(logits, np.float32), params(temperature=temperature, banned_token_ids=frozenset({1})), 5)


def test_the_row_is_left_as_it_was() -> None:
    logits_V = random_logits()
    kept = logits_V.copy()
    sample(logits_V, params(repetition_penalty=2, banned_token_ids=frozenset({1}), top_p=0.5, logprobs=3), 4)
    np.testing.assert_array_equal(logits_V, kept)


def test_the_stream_depends_on_seed_child_and_position_only() -> None:
    logits_V = np.zeros(1000, np.float32)
    forward = [sample(logits_V, params(seed=1), position) for position in range(50)]
    backward = [sample(logits_V, params(seed=1), position) for position in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != [sample(logits_V, params(seed=2), position) for position in range(50)]
    assert forward != [sample(logits_V, params(seed=1), position, child=1) for position in range(50)]
    assert len(set(forward)) > 40


def test_the_streams_are_those_of_philox() -> None:
    """Pinned, so that a seed gives the same text after an update; `numpy.random.Philox` is documented to be stable."""
    logits_V = np.zeros(2**16, np.float32)
    for seed, child, position in ((0, 0, 0), (7, 0, 3), (7, 2, 3)):
        generator = np.random.Philox(key=np.array([seed, position], np.uint64), counter=[child, 0, 0, 0])
        uniform = (int(generator.random_raw()) >> 11) / 2**53
        assert sample(logits_V, params(seed=seed), position, child) == int(uniform * 2**16)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert 0 <= sample(random_logits(), params(seed=seed), 0) < 12


def test_seeds_children_and_positions_are_independent() -> None:
    """The streams of neighbours share nothing, not even when positions are shifted against each other."""
    logits_V = np.zeros(2, np.float32)
    streams = [(seed, child) for seed in range(4) for child in range(2)]
    bits = np.array([[sample(logits_V, params(seed=s), p, child) for p in range(400)] for s, child in streams])
    correlations = np.corrcoef(bits)[np.triu_indices(8, 1)]
    shifted = [np.corrcoef(bits[s, 1:], bits[s + 1, :-1])[0, 1] for s in range(7)]
    assert np.abs([*correlations, *shifted]).max() < 5 / math.sqrt(400)
