import torch

from trainer.config import ModelConfig
from trainer.model import OSPModel
from trainer.outliers import residual_outliers


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
