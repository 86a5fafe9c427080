"""The measure of outliers against its formula in numpy, and on tokens whose value is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.outliers import excess_kurtosis


def test_it_is_the_papers_formula():
    x = np.random.default_rng(0).standard_t(5, (40, 64))
    by_hand = np.maximum((x**4).mean(-1) / x.std(-1) ** 4 - 3, 0)
    np.testing.assert_allclose(excess_kurtosis(torch.from_numpy(x)).numpy(), by_hand, rtol=1e-10)


def test_excess_kurtosis_of_known_tokens():
    one_channel = torch.zeros(1, 1024)
    one_channel[0, 3] = -5
    normal = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    assert excess_kurtosis(one_channel).item() == pytest.approx(1024, rel=0.01)
    assert excess_kurtosis(normal).item() == pytest.approx(0, abs=0.1)
    assert excess_kurtosis(torch.tensor([[1.0, -1.0]])).item() == 0  # platykurtic: the relu
    assert excess_kurtosis(torch.tensor([[0.0, 0.0], [2.0, 2.0]])).tolist() == [0, 0]


def test_any_number_of_tokens_in_any_type_is_left_as_it_was():
    for rows in (0, 1, 15, 16, 17, 50):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x_ND = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)).to(dtype)
            kept_ND = x_ND.clone()
            measured_N = excess_kurtosis(x_ND)
            assert measured_N.dtype == torch.float64
            assert torch.equal(x_ND, kept_ND)
            one_by_one = [excess_kurtosis(row_D[None]).item() for row_D in x_ND]
            assert measured_N.tolist() == one_by_one


def test_neither_the_largest_nor_the_smallest_floats_break_it():
    for magnitude in (1e38, 1e-38):
        one_channel = torch.zeros(1, 64)
        one_channel[0, 3] = magnitude
        assert excess_kurtosis(one_channel).item() == pytest.approx(64, rel=0.1)
