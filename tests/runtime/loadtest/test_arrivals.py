"""Arrival times against what is known of gamma distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.loadtest.arrivals import arrival_times

COUNT = 20_000


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_their_distribution(burstiness: float) -> None:
    gaps_N = np.diff(arrival_times(COUNT, 50.0, burstiness, seed=1), prepend=0.0)

    assert gaps_N.mean() == pytest.approx(1 / 50)
    # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
    assert gaps_N.std() / gaps_N.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_burstiness_of_one_is_a_poisson_process() -> None:
    times_N = arrival_times(COUNT, 10.0, 1.0, seed=2)
    counts, _ = np.histogram(times_N, bins=np.arange(0, COUNT / 10, 1.0))

    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)  # of a Poisson distribution they are equal


def test_ends_of_the_range() -> None:
    assert arrival_times(5, math.inf, 1.0, seed=0).tolist() == [0.0] * 5
    np.testing.assert_allclose(arrival_times(4, 2.0, math.inf, seed=0), [0.5, 1.0, 1.5, 2.0])
    assert arrival_times(0, 2.0, 1.0, seed=0).tolist() == []


def test_a_seed_decides() -> None:
    first, again, other = (arrival_times(50, 2.0, 1.0, seed) for seed in (1, 1, 2))

    assert (first == again).all()
    assert not (first == other).all()


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0)])
def test_impossible_settings_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        arrival_times(3, rate, burstiness, seed=0)
