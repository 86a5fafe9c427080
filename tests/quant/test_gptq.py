"""GPTQ against plain optimal brain quantization, a column at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant import arithmetic
from quant.gptq import InputHessian, NotPositiveDefiniteError, gptq
from quant.rounding import choose_scales, round_to_nearest


def correlated(rows, width, seed=0):
    """Inputs whose channels follow a few common ones, as a transformer's do."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(rows, max(1, width // 4))) @ random.normal(size=(max(1, width // 4), width))
    return (common + 0.3 * random.normal(size=(rows, width))).astype(np.float32)


def hessian_of(x_NK):
    x_NK = x_NK.astype(np.float64)
    return 2 / len(x_NK) * x_NK.T @ x_NK


def weights(outputs, width, seed=1):
    return np.random.default_rng(seed).normal(size=(outputs, width)).astype(np.float32)


def optimal_brain_quantization(weight_MK, scales, bits, hessian_KK, damping=0.01):
    """The update of a column from the inverse Hessian itself, from which the column is then eliminated."""
    left_MK, width = weight_MK.astype(np.float64), weight_MK.shape[1]
    inverse_KK = np.linalg.inv(hessian_KK + damping * np.trace(hessian_KK) / width * np.eye(width))
    codes_MK = np.empty(weight_MK.shape, np.int8)
    scale_M1 = scales[:, None].astype(np.float64)
    for k in range(width):
        column_M1 = left_MK[:, k : k + 1]
        rounded_M1 = np.clip(np.rint(column_M1 / scale_M1), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes_MK[:, k : k + 1] = rounded_M1
        left_MK = left_MK - (column_M1 - rounded_M1 * scale_M1) / inverse_KK[k, k] * inverse_KK[k]
        inverse_KK = inverse_KK - np.outer(inverse_KK[:, k], inverse_KK[k]) / inverse_KK[k, k]
        inverse_KK[k, k] = 1  # eliminated: never read again, but it must not divide by zero
    return codes_MK


def layer_error(weight_MK, codes_MK, scales, x_NK):
    difference_MK = weight_MK.astype(np.float64) - codes_MK * scales[:, None].astype(np.float64)
    return float(np.square(x_NK.astype(np.float64) @ difference_MK.T).sum())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("outputs", "width", "bits"), [(1, 1, 4), (5, 1, 4), (1, 9, 4), (12, 40, 4), (9, 33, 8)])
def test_codes_are_those_of_optimal_brain_quantization(outputs, width, bits, granularity):
    weight_MK, hessian_KK = weights(outputs, width), hessian_of(correlated(200, width))
    scales = choose_scales(weight_MK, "w", bits, granularity)
    before = weight_MK.copy(), hessian_KK.copy()
    codes_MK = gptq(weight_MK, "w", scales, bits, hessian_KK, block_size=16)
    assert codes_MK.dtype == np.int8
    np.testing.assert_array_equal(codes_MK, optimal_brain_quantization(weight_MK, scales, bits, hessian_KK))
    np.testing.assert_array_equal(weight_MK, before[0])
    np.testing.assert_array_equal(hessian_KK, before[1])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_outputs_are_nearer_than_by_rounding(granularity):
    x_NK, weight_MK = correlated(2000, 96), weights(64, 96)
    rounded = round_to_nearest(weight_MK, "w", 4, granularity).weight
    codes_MK = gptq(weight_MK, "w", rounded.scale, 4, hessian_of(x_NK))
    by_rounding = layer_error(weight_MK, rounded.codes, rounded.scale, x_NK)
    assert layer_error(weight_MK, codes_MK, rounded.scale, x_NK) < 0.5 * by_rounding


def test_inputs_that_are_not_correlated_leave_nothing_to_make_up_for():
    weight_MK = weights(7, 20)
    rounded = round_to_nearest(weight_MK, "w", 4, "channel").weight
    hessian_KK = np.diag(np.random.default_rng(2).uniform(0.1, 10, 20))
    np.testing.assert_array_equal(gptq(weight_MK, "w", rounded.scale, 4, hessian_KK), rounded.codes)


@pytest.mark.parametrize("block_size", [1, 7, 64, 300, 1000])
def test_the_block_size_changes_no_code(block_size):
    x_NK, weight_MK = correlated(1000, 300), weights(40, 300)
    scales = choose_scales(weight_MK, "w", 4, "tensor")
    codes_MK = gptq(weight_MK, "w", scales, 4, hessian_of(x_NK), block_size)
    wanted_MK = gptq(weight_MK, "w", scales, 4, hessian_of(x_NK))
    # The order of float32 sums changes with it, which may turn a tie, and from there what follows in that row.
    assert (codes_MK != wanted_MK).any(axis=1).sum() <= 1
    error, wanted = (layer_error(weight_MK, codes, scales, x_NK) for codes in (codes_MK, wanted_MK))
    assert error == pytest.approx(wanted, rel=1e-2)


def test_dead_channels_are_rounded_and_change_nothing_else():
    x_NK, weight_MK = correlated(500, 30), weights(8, 30)
    dead = [0, 11, 12, 29]
    x_NK[:, dead] = 0
    alive = np.setdiff1d(np.arange(30), dead)
    scales = choose_scales(weight_MK, "w", 4, "channel")
    codes_MK = gptq(weight_MK, "w", scales, 4, hessian_of(x_NK), block_size=8)
    np.testing.assert_array_equal(codes_MK[:, dead], arithmetic.quantize(weight_MK[:, dead], scales[:, None]))
    without = gptq(weight_MK[:, alive], "w", scales, 4, hessian_of(x_NK[:, alive]))
    np.testing.assert_array_equal(codes_MK[:, alive], without)


def indefinite():
    hessian_KK = hessian_of(correlated(100, 6))
    hessian_KK[0, 1] = hessian_KK[1, 0] = 100 * hessian_KK.max()
    return hessian_KK


UNUSABLE = {
    "indefinite": (indefinite(), "is not positive definite"),
    "negative": (-np.eye(6), "is not positive definite"),
    "NaN": (np.full((6, 6), np.nan), "is not finite"),
    "infinite": (np.diag([1, 1, 1, 1, 1, np.inf]), "is not finite"),
    "zero": (np.zeros((6, 6)), "all of them were zero"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_hessian_that_cannot_be_factored_is_refused_by_name(kind):
    hessian_KK, message = UNUSABLE[kind]
    weight_MK = weights(3, 6)
    scales = choose_scales(weight_MK, "w", 4, "tensor")
    with pytest.raises(NotPositiveDefiniteError, match=rf"layers\.3\.mlp: .*{message}"):
        gptq(weight_MK, "layers.3.mlp", scales, 4, hessian_KK)


def test_fewer_tokens_than_channels_are_made_definite_by_damping():
    x_NK, weight_MK = correlated(5, 40), weights(6, 40)
    rounded = round_to_nearest(weight_MK, "w", 4, "tensor").weight
    codes_MK = gptq(weight_MK, "w", rounded.scale, 4, hessian_of(x_NK))
    by_rounding = layer_error(weight_MK, rounded.codes, rounded.scale, x_NK)
    assert layer_error(weight_MK, codes_MK, rounded.scale, x_NK) < by_rounding
    with pytest.raises(NotPositiveDefiniteError):
        gptq(weight_MK, "w", rounded.scale, 4, hessian_of(x_NK), damping=0)


def test_corrections_that_overflow_are_refused():
    weight_MK = np.full((2, 3), 3e38, np.float32)
    hessian_KK = np.ones((3, 3)) + 1e-9 * np.eye(3)
    with pytest.raises(NotPositiveDefiniteError, match=r"layers\.3: the corrections of GPTQ overflow"):
        gptq(weight_MK, "layers.3", np.ones(1, np.float32), 4, hessian_KK, damping=0)


def test_a_weight_that_is_not_finite_is_refused_by_name():
    weight_MK = weights(2, 3)
    weight_MK[1, 2] = np.nan
    with pytest.raises(arithmetic.NonFiniteError, match=r"o_proj: 1 of 6 .* \(1, 2\)"):
        gptq(weight_MK, "o_proj", np.ones(1, np.float32), 4, np.eye(3))


def test_a_hessian_of_parts_is_that_of_the_whole():
    x_NK, hessian = correlated(301, 24), InputHessian(24)
    for part in np.array_split(x_NK, 4):
        hessian.add(part)
    hessian.add(torch.empty(0, 24))
    assert hessian.tokens == 301
    np.testing.assert_allclose(hessian.matrix.numpy(), hessian_of(x_NK), rtol=1e-5, atol=1e-5)
    of_bfloat16 = InputHessian(24)
    of_bfloat16.add(torch.from_numpy(x_NK).bfloat16())
    np.testing.assert_allclose(of_bfloat16.matrix.numpy(), hessian_of(x_NK), rtol=0.05, atol=0.1)


def test_a_hessian_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        _ = InputHessian(3).matrix
