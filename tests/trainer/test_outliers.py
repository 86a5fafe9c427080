import numpy as np
import pytest
import torch

from trainer.config import ModelConfig
from trainer.model import OSPModel
from trainer.outliers import excess_kurtosis, residual_outliers


def test_it_is_the_papers_formula():
    x = np.random.default_rng(0).standard_t(5, (40, 64))
    by_hand = np.maximum((x**4).mean(-1) / x.std(-1) ** 4 - 3, 0).mean()
    assert excess_kurtosis(torch.from_numpy(x).float()) == pytest.approx(by_hand, rel=1e-5)


def test_known_distributions():
    generator = torch.Generator().manual_seed(0)
    assert excess_kurtosis(torch.randn(8, 100_000, generator=generator)) < 0.05
    assert excess_kurtosis(torch.rand(8, 1000, generator=generator) - 0.5) == 0
    one_channel = torch.zeros(4, 1000)
    one_channel[:, 17] = 300
    assert excess_kurtosis(one_channel) == pytest.approx(1000, rel=0.01)


def test_the_residual_stream_is_measured_after_each_block():
    torch.manual_seed(0)
    model = OSPModel(ModelConfig(96, 48, 80, num_layers=3, num_heads=4, context_length=32), "osp")
    ids = torch.randint(96, (2, 16))
    calm = residual_outliers(model, ids)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[7] += 50
    loud = residual_outliers(model, ids)
    assert len(calm["excess_kurtosis"]) == 3
    assert loud["excess_kurtosis"][0] == calm["excess_kurtosis"][0]
    assert loud["excess_kurtosis"][1] > 10 > calm["excess_kurtosis"][1]
    assert loud["absmax"][1] > 10 * calm["absmax"][1]
    assert not any(layer._forward_hooks for layer in model.layers)
