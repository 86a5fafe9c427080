"""The clip search against brute force, and the codes against the specification."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant import arithmetic
from quant.histogram import Histogram
from quant.rounding import round_to_nearest

RANDOM = np.random.default_rng(20)
ONE_HUGE = RANDOM.normal(size=20_000)
ONE_HUGE[7] = 1e4
SPARSE = np.where(RANDOM.random(20_000) < 0.99, 0, RANDOM.normal(size=20_000))
DISTRIBUTIONS = {
    "normal": RANDOM.normal(size=20_000),
    "uniform": RANDOM.uniform(-1, 1, size=20_000),
    "laplace": RANDOM.laplace(size=20_000),
    "student": RANDOM.standard_t(2, size=20_000),
    "cauchy": RANDOM.standard_cauchy(size=20_000),
    "lognormal": np.exp(3 * RANDOM.normal(size=20_000)),
    "one huge value": ONE_HUGE,
    "sparse": SPARSE,
    "negative": -np.abs(RANDOM.normal(size=20_000)),
    "few": RANDOM.normal(size=5),
    "two levels": np.where(RANDOM.random(20_000) < 0.5, -1.0, 0.125),
}


def squared_error(values, scale):
    errors = values.astype(np.float64) - arithmetic.quantize(values, scale) * np.float64(scale)
    return float(np.square(errors).mean())


def brute_force(values):
    """The least error over a fine grid of clip bounds, from 1/10,000 of the absmax to a little above it."""
    bounds = np.abs(values).max() * np.geomspace(1e-4, 1.05, 3000)
    return min(squared_error(values, arithmetic.tensor_scale(bound)) for bound in bounds)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_clip_bound_is_better_than_the_chosen_one(distribution):
    # bfloat16 weights fall into bins of their own, so the choice is the best one, not nearly the best one.
    values = DISTRIBUTIONS[distribution].astype(ml_dtypes.bfloat16).astype(np.float32)
    rounded = round_to_nearest(values[None], "w")
    assert rounded.mse <= brute_force(values) * (1 + 1e-9)
    assert rounded.mse == pytest.approx(squared_error(values, rounded.scale), rel=1e-12)


@pytest.mark.parametrize("distribution", ["normal", "laplace", "student", "lognormal", "sparse"])
def test_float32_weights_lose_next_to_nothing_to_the_bins(distribution):
    values = DISTRIBUTIONS[distribution].astype(np.float32)
    assert round_to_nearest(values[None], "w").mse <= brute_force(values) * 1.002


def test_a_heavy_tail_is_clipped_far_below_its_absmax():
    values = np.append(np.random.default_rng(0).normal(size=1_000_000), 300).astype(np.float32)
    chosen = round_to_nearest(values[None], "w")
    assert chosen.clip_ratio < 0.02
    assert chosen.mse < 0.2 * squared_error(values, arithmetic.tensor_scale(300.0))


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
@example(np.full((1, 1), 3.4028234663852886e38, np.float32))
@example(np.full((1, 2), 1e-45, np.float32))
@example(np.array([[3.4e38, 1e-45]], np.float32))
@example(np.full((3, 3), -0.3, np.float32))
def test_codes_are_those_of_the_specification(weight_MK):
    rounded = round_to_nearest(weight_MK, "w")
    assert np.isfinite(rounded.scale)
    assert rounded.scale > 0
    assert np.float32(ml_dtypes.bfloat16(rounded.scale)) == rounded.scale
    assert rounded.codes.dtype == np.int8
    np.testing.assert_array_equal(rounded.codes, arithmetic.quantize(weight_MK, rounded.scale))
    assert rounded.mse == pytest.approx(squared_error(weight_MK, rounded.scale), rel=1e-9)
    assert rounded.absmax == np.abs(weight_MK).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_zero_tensor_has_scale_one_and_codes_zero(dtype):
    rounded = round_to_nearest(np.zeros((3, 5), dtype), "w")
    assert (rounded.scale, rounded.mse, rounded.clip_ratio, rounded.absmax) == (1.0, 0.0, 1.0, 0.0)
    assert not rounded.codes.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    weight = np.zeros((2, 3), np.float32)
    weight[1, 0] = bad
    with pytest.raises(arithmetic.NonFiniteError, match=r"layers\.3\.weight.*\(1, 0\)"):
        round_to_nearest(weight, "layers.3.weight")


def test_a_histogram_of_parts_is_that_of_the_whole():
    values = DISTRIBUTIONS["student"].astype(np.float32)
    whole, parts = Histogram(), Histogram()
    whole.add(values, "x")
    for part in np.array_split(values, 7):
        parts.add(part, "x")
    parts.add(np.empty(0, np.float32), "x")
    assert parts.total == values.size
    assert parts.absmax == np.abs(values).max()
    assert parts.choose_scale("x") == whole.choose_scale("x")
