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
