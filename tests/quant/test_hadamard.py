"""Hadamard matrices in exact integers, and the transforms against their definition in float64."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.hadamard import LARGEST_BASE, Hadamard, base_matrix, sylvester

WIDTHS = {
    # width: (blocks, base, power)
    2: (1, 1, 2),
    6: (3, 1, 2),
    12: (1, 12, 1),
    64: (1, 1, 64),
    80: (1, 20, 4),
    102: (51, 1, 2),
    576: (1, 36, 16),
    640: (1, 20, 32),
    1536: (1, 12, 128),
    5504: (1, 172, 32),
}


def definition(width):
    """The orthogonal matrix, from the Kronecker products that the module's formula is."""
    blocks, base, power = WIDTHS[width]
    whole = np.kron(np.eye(blocks), np.kron(base_matrix(base).astype(float), sylvester(power).astype(float)))
    return whole / np.sqrt(base * power)


def require_hadamard(matrix, order):
    assert matrix.shape == (order, order)
    assert set(np.unique(matrix)) <= {-1, 1}
    wide = matrix.astype(np.float64)  # whose sums of so few signs are exact integers
    np.testing.assert_array_equal(wide @ wide.T, order * np.eye(order))


def test_every_base_matrix_is_a_hadamard_matrix():
    known = []
    for order in range(1, LARGEST_BASE + 1):
        with contextlib.suppress(ValueError):
            require_hadamard(base_matrix(order), order)
            known.append(order)
    # Paley's first construction where one less is a prime, his second where half of it less one is; then Williamson's.
    assert {1, 4, 8, 12, 20, 24, 44, 60, 108, 36, 28, 76, 172} <= set(known)
    assert len(known) > 60


@pytest.mark.parametrize("order", [1, 2, 4, 128])
def test_sylvester_matrices_are_hadamard_matrices(order):
    matrix = sylvester(order)
    require_hadamard(matrix, order)
    # The sign is that of the bits that the indices share, which is what the butterflies compute.
    index = np.arange(order)
    shared = np.array([[bin(i & j).count("1") for j in index] for i in index])
    np.testing.assert_array_equal(matrix, (-1) ** shared)


@pytest.mark.parametrize("order", [0, 2, 3, 6, 92, 999])
def test_an_order_without_a_known_matrix_is_refused(order):
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order} is known"):
        base_matrix(order)


def test_base_matrices_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        base_matrix(12)[0, 0] = 5


@pytest.mark.parametrize("width", WIDTHS)
def test_which_transform_a_width_has(width):
    transform = Hadamard.of_width(width)
    assert (transform.blocks, transform.base, transform.power) == WIDTHS[width]
    assert transform.width == width


@given(st.integers(1, 6000))
def test_every_even_width_has_a_transform(half):
    transform = Hadamard.of_width(2 * half)
    assert transform.width == 2 * half
    assert transform.power & (transform.power - 1) == 0
    if transform.blocks > 1:
        assert transform.base == 1


@pytest.mark.parametrize("width", [-2, 0, 1, 3, 51, 5503])
def test_an_odd_width_is_refused(width):
    with pytest.raises(ValueError, match=f"an even width, not {width}"):
        Hadamard.of_width(width)


@pytest.mark.parametrize("width", [width for width in WIDTHS if width <= 1536])
def test_a_transform_is_its_definition(width):
    x_NK = np.random.default_rng(width).normal(size=(3, 2, width))
    wanted = x_NK @ definition(width).T
    np.testing.assert_allclose(Hadamard.of_width(width).apply(x_NK), wanted, atol=1e-12)
    np.testing.assert_allclose(Hadamard.of_width(width).matrix(), definition(width), atol=1e-12)
    single = Hadamard.of_width(width).apply(x_NK.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, wanted, atol=1e-5)


def test_a_transform_of_5504_channels_is_its_definition():
    transform, width = Hadamard.of_width(5504), 5504
    x_NK = np.random.default_rng(0).normal(size=(2, width))
    # Column by column of the definition: H[i, p] S[j, q] / sqrt(m 2^k), without the whole matrix.
    rows = x_NK.reshape(2, 172, 32)
    wanted = np.einsum("ip,jq,bpq->bij", base_matrix(172).astype(float), sylvester(32).astype(float), rows)
    np.testing.assert_allclose(transform.apply(x_NK), wanted.reshape(2, width) / np.sqrt(width), atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotated_weight_makes_up_for_a_rotated_input(width):
    random, transform = np.random.default_rng(width), Hadamard.of_width(width)
    x_NK, w_MK = random.normal(size=(3, width)), random.normal(size=(4, width))
    turned = transform.apply(x_NK) @ transform.apply(w_MK).T
    np.testing.assert_allclose(turned, x_NK @ w_MK.T, atol=1e-12 * width)
    np.testing.assert_allclose(np.linalg.norm(transform.apply(x_NK), axis=1), np.linalg.norm(x_NK, axis=1), rtol=1e-12)


@pytest.mark.parametrize("width", [80, 576, 5504])
def test_one_outlier_is_spread_over_all_channels(width):
    x_K = np.zeros(width)
    x_K[width // 3] = 10
    np.testing.assert_allclose(np.abs(Hadamard.of_width(width).apply(x_K)), 10 / np.sqrt(width), rtol=1e-12)


@pytest.mark.parametrize("width", [6, 80, 5504])
def test_the_order_of_float32_operations_is_the_specified_one(width):
    """The bits of plain loops: butterflies with strides 1, 2, 4, …; sums over p, four at a time; one multiply."""
    transform = Hadamard.of_width(width)
    blocks, base, power = transform.blocks, transform.base, transform.power
    x_K = np.random.default_rng(1).normal(size=width).astype(np.float32)
    rows = x_K.copy().reshape(blocks, base, power)
    stride = 1
    while stride < power:
        for q in range(power):
            if not q & stride:
                first, second = rows[..., q].copy(), rows[..., q + stride].copy()
                rows[..., q], rows[..., q + stride] = first + second, first - second
        stride *= 2
    sums = np.zeros_like(rows)
    signs = base_matrix(base).astype(np.float32)
    for i in range(base):
        for p in range(0, base, 4) if base > 1 else ():
            left = signs[i, p] * rows[:, p] + signs[i, p + 1] * rows[:, p + 1]
            sums[:, i] += left + (signs[i, p + 2] * rows[:, p + 2] + signs[i, p + 3] * rows[:, p + 3])
    sums = sums if base > 1 else rows
    wanted = sums.reshape(width) * np.float32(1 / np.sqrt(base * power))
    assert Hadamard.of_width(width).apply(x_K).tobytes() == wanted.tobytes()
