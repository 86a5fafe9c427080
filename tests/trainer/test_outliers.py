import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from trainer.config import ModelConfig
from trainer.export import folded, llama_config, llama_state
from trainer.model import OSPModel
from trainer.outliers import SITES, SiteOutliers, measure_outliers, single_tokens

SHAPE = ModelConfig(96, 48, 80, num_layers=3, num_heads=4, context_length=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return OSPModel(SHAPE, "adam")


@pytest.fixture
def ids():
    return torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))


def by_numpy(x_BLD):
    """Excess kurtosis and absmax, by the paper's formula in float64."""
    x_ND = x_BLD.double().numpy().reshape(-1, x_BLD.shape[-1])
    fourth_N = (x_ND**4).mean(-1)
    kurtosis_N = np.maximum(fourth_N / x_ND.std(-1) ** 4 - 3, 0)
    return kurtosis_N.mean(), np.abs(x_ND).max()


@pytest.mark.parametrize("alone", [False, True])
def test_every_site_of_every_layer_is_what_transformers_llama_has_there(model, ids, alone):
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[7] += 5  # an outlier channel from the second block on
        model.layers[2].input_layernorm.weight[3] = 30
    ids = single_tokens(ids, 20) if alone else ids
    llama = LlamaForCausalLM(llama_config(model)).eval()
    llama.load_state_dict(llama_state(folded(model)))
    seen = {site: [] for site in SITES}
    for layer in llama.model.layers:
        layer.register_forward_hook(lambda m, i, out: seen["residual"].append(out))
        layer.self_attn.k_proj.register_forward_pre_hook(lambda m, i: seen["qkv"].append(i[0]))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, i: seen["o"].append(i[0]))
        layer.mlp.up_proj.register_forward_pre_hook(lambda m, i: seen["gate_up"].append(i[0]))
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, i: seen["down"].append(i[0]))
    with torch.no_grad():
        llama(ids)
    measured = measure_outliers(model, ids)
    assert list(measured) == list(SITES)
    for site, tensors in seen.items():
        kurtosis, absmax = zip(*map(by_numpy, tensors), strict=True)
        np.testing.assert_allclose(measured[site].excess_kurtosis, kurtosis, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(measured[site].absmax, absmax, rtol=1e-5)
    assert measured["residual"].excess_kurtosis[1] > 10 > measured["residual"].excess_kurtosis[0]


def test_a_token_alone_knows_nothing_of_its_neighbours(model, ids):
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 96
    first = [measure_outliers(model, single_tokens(rows[:1], 8)) for rows in (ids, changed)]
    assert first[0] == first[1]
    assert measure_outliers(model, ids) != measure_outliers(model, changed)


def test_single_tokens_come_in_the_order_of_the_text(ids):
    assert torch.equal(single_tokens(ids, 20)[:, 0], torch.cat([ids[0], ids[1, :4]]))
    assert single_tokens(ids, 1000).shape == (32, 1)


def test_measuring_leaves_nothing_behind(model, ids):
    before = model(ids)
    measure_outliers(model, ids)
    assert torch.equal(model(ids), before)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_layers_of_a_site_are_summed_up():
    site = SiteOutliers(excess_kurtosis=[0.5, 4.0, 1.5], absmax=[2.0, 70.0, 3.0])
    assert (site.mean_kurtosis, site.largest) == (2.0, 70.0)
