"""Confidence intervals against Student's t, integrated here, and against simulated repeats."""

from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.loadtest import ratio
from runtime.loadtest.ratio import ratio_of_repeats


@pytest.mark.parametrize("freedom", range(1, 11))
def test_quantiles_of_student_t(freedom: int) -> None:
    quantile = ratio._STUDENT_T[freedom - 1]
    factor = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    t_N = np.linspace(-quantile, quantile, 200_001)

    inside = np.trapezoid(factor * (1 + t_N**2 / freedom) ** (-(freedom + 1) / 2), t_N)

    assert inside == pytest.approx(0.95, abs=1e-4)


def test_the_interval_holds_the_truth_in_95_of_100_runs() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        machine_R = rng.lognormal(0, 0.5, 3)  # what both of a pair have in common falls out
        a_R, b_R = 3 * machine_R * rng.lognormal(0, 0.1, 3), machine_R * rng.lognormal(0, 0.1, 3)
        found = ratio_of_repeats(a_R.tolist(), b_R.tolist())
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 3 <= found.high

    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_what_cannot_be_compared() -> None:
    single = ratio_of_repeats([6.0], [2.0])

    assert single is not None
    assert (single.median, single.low, single.high) == (3.0, None, None)
    assert ratio_of_repeats([], []) is None
    assert ratio_of_repeats([1.0, 2.0], [0.0, 1.0]) is None
