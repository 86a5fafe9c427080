"""Calibration against activations captured from the model whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from quant import arithmetic
from quant.calibrate import calibrate
from quant.format import read_checkpoint
from quant.model import load_model
from quant.text import TextError

WINDOWS = [[int(i) for i in np.random.default_rng(n).integers(0, 256, length)] for n, length in enumerate((32, 7, 32))]


@pytest.fixture
def model(checkpoint_path):
    return load_model(read_checkpoint(checkpoint_path))


def captured_inputs(path):
    """Linear name -> float32 [tokens, K], from transformers' own loading of the checkpoint."""
    model, inputs = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32), {}
    for name, module in model.named_modules():
        if name.startswith("model.layers") and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]))
    return {name: torch.cat(parts).numpy() for name, parts in inputs.items()}


def test_every_layer_gets_the_range_of_its_input(checkpoint_path, model):
    ranges, inputs = calibrate(model, WINDOWS), captured_inputs(checkpoint_path)
    assert ranges.keys() == inputs.keys() == read_checkpoint(checkpoint_path).linears.keys()
    for name, x_ND in inputs.items():
        seen = ranges[name]
        assert seen.tokens == len(x_ND) == 71
        assert seen.absmax == pytest.approx(np.abs(x_ND).max(), rel=1e-5)
        centred = x_ND - x_ND.mean(-1, keepdims=True)
        kurtosis = (x_ND**4).mean(-1) / (centred**2).mean(-1) ** 2 - 3
        assert seen.excess_kurtosis == pytest.approx(np.maximum(kurtosis, 0).mean(), rel=1e-4)

        def squared_error(scale, x_ND=x_ND):
            return np.square(x_ND - arithmetic.quantize(x_ND, scale) * scale).mean(dtype=np.float64)

        best = min(squared_error(arithmetic.tensor_scale(seen.absmax * r)) for r in np.geomspace(0.01, 1, 600))
        assert squared_error(seen.scale) <= best * 1.02
        assert seen.mse == pytest.approx(squared_error(seen.scale), rel=0.02)
        assert seen.clip_ratio == pytest.approx(7 * float(seen.scale) / seen.absmax)


def test_layers_that_read_one_tensor_share_one_scale(model):
    scales = {name.removeprefix("model.layers.1."): seen.scale for name, seen in calibrate(model, WINDOWS).items()}
    assert scales["self_attn.q_proj"] == scales["self_attn.k_proj"] == scales["self_attn.v_proj"]
    assert scales["mlp.gate_proj"] == scales["mlp.up_proj"]
    assert len({scales[f"{m}_proj"] for m in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")}) == 4


def test_an_outlier_channel_shows(make_checkpoint):
    model = load_model(read_checkpoint(make_checkpoint()))
    calm = calibrate(model, WINDOWS)["model.layers.0.mlp.gate_proj"]
    model.model.layers[0].post_attention_layernorm.weight[5] = 50
    wild = calibrate(model, WINDOWS)["model.layers.0.mlp.gate_proj"]
    assert calm.excess_kurtosis < 1
    assert wild.excess_kurtosis > 10
    assert wild.absmax > 10 * calm.absmax


def test_a_layer_that_saw_no_token_is_named(model):
    with pytest.raises(TextError, match=r"model\.layers\.0\.self_attn\.q_proj saw no token"):
        calibrate(model, [])


def test_an_input_that_is_not_finite_is_named(model):
    model.model.layers[1].post_attention_layernorm.weight[5] = float("nan")
    with pytest.raises(arithmetic.NonFiniteError, match=r"input of model\.layers\.1\.mlp\.gate_proj"):
        calibrate(model, WINDOWS)


def test_calibration_leaves_no_hooks(model):
    calibrate(model, WINDOWS)
    assert not any(module._forward_pre_hooks for module in model.modules())
