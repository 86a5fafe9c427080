"""The Hadamard transform in torch against the matrix that defines it, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.hadamard import Hadamard
from quant.model import HadamardTransform


@pytest.mark.parametrize("width", [2, 14, 24, 64, 128, 256, 640, 688, 1024, 1536])
def test_it_is_the_product_with_the_matrix(width):
    x_BLF = np.random.default_rng(width).normal(size=(2, 3, width))
    transform = HadamardTransform(width)
    wanted = x_BLF @ Hadamard.of_width(width).matrix().T
    np.testing.assert_allclose(transform(torch.from_numpy(x_BLF)).numpy(), wanted, atol=1e-12)
    single = transform(torch.from_numpy(x_BLF).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), wanted, atol=1e-5)


def test_a_wide_power_of_two_needs_no_matrix_of_its_width():
    transform = HadamardTransform(16_384)
    assert sum(buffer.nbytes for buffer in transform.buffers()) < 2**19
    x_NF = torch.randn(2, 16_384, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(transform(x_NF), Hadamard.of_width(16_384).apply(x_NF.numpy()), atol=1e-4)


def test_a_gradient_passes():
    x_NF = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(HadamardTransform(24), (x_NF,))
