"""Calibration a block at a time against activations captured from transformers' whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from quant import arithmetic
from quant.calibrate import Calibration
from quant.clip import ClipSearch
from quant.format import CheckpointReader
from quant.hadamard import Hadamard
from quant.model import build_block, build_norm
from quant.scheme import named
from quant.stream import HiddenStates
from quant.text import TextError

WINDOWS = [[int(i) for i in np.random.default_rng(n).integers(0, 256, length)] for n, length in enumerate((32, 7, 32))]
TOKENS = 71
FFN = {"hadamard": "ffn"}


@pytest.fixture
def path(make_checkpoint):
    return make_checkpoint(intermediate_size=40)


def observed(path, scheme, windows=WINDOWS, change=None, **settings):
    """Module name -> statistics of every block; `change(layer, block)` may spoil a block first."""
    reader = CheckpointReader(path)
    plan = Calibration(scheme, settings.pop("clip", ClipSearch()), **settings)
    hidden, seen = HiddenStates(reader, windows), {}
    for layer in range(reader.config.num_hidden_layers):
        block = build_block(reader, hidden.config, layer)
        if change:
            change(layer, block)
        seen |= plan.observe_block(hidden, block, layer)
        assert not any(module._forward_pre_hooks for module in block.modules())
    return seen


def captured(path):
    """Module name -> float32 [tokens, K], from transformers' own loading of the checkpoint; the head's as well."""
    model, inputs = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]))
    return {name: torch.cat(parts).numpy() for name, parts in inputs.items()}


def kurtosis(x_ND):
    centred = x_ND - x_ND.mean(-1, keepdims=True)
    return np.maximum((x_ND**4).mean(-1) / (centred**2).mean(-1) ** 2 - 3, 0).mean()


def squared_error(x_ND, scale, bits):
    return np.square(x_ND - arithmetic.quantize(x_ND, scale, bits) * np.float64(scale)).mean()


@pytest.mark.parametrize(("scheme", "bits"), [("w4a4", 4), ("w4a8", 8)])
def test_static_scales_lose_no_more_than_the_best_of_a_brute_force_search(path, scheme, bits):
    seen, inputs = observed(path, named(scheme)), captured(path)
    assert seen.keys() == inputs.keys() - {"lm_head"} == CheckpointReader(path).config.linear_shapes().keys()
    for name, statistics in seen.items():
        x_ND = inputs[name]
        assert statistics.tokens == len(x_ND) == TOKENS
        assert statistics.absmax == pytest.approx(np.abs(x_ND).max(), rel=1e-5)
        assert statistics.excess_kurtosis == pytest.approx(kurtosis(x_ND), rel=1e-4)
        assert statistics.rotated_excess_kurtosis is None
        assert statistics.hessian is None

        bounds = statistics.absmax * np.geomspace(0.01, 1, 600)
        best = min(squared_error(x_ND, arithmetic.tensor_scale(bound, bits=bits), bits) for bound in bounds)
        assert squared_error(x_ND, statistics.scale, bits) <= best * 1.02
        assert statistics.mse == pytest.approx(squared_error(x_ND, statistics.scale, bits), rel=0.02)
        highest = 2 ** (bits - 1) - 1
        assert statistics.clip_ratio == pytest.approx(highest * float(statistics.scale) / statistics.absmax)


def test_a_percentile_bounds_static_scales(path):
    seen, inputs = observed(path, named("w4a4"), clip=ClipSearch(percentile=99)), captured(path)
    for name, statistics in seen.items():
        assert float(statistics.scale) * 7 == pytest.approx(np.percentile(np.abs(inputs[name]), 99), rel=0.02)


def test_the_norm_of_the_error_decides(path):
    squared, high = (observed(path, named("w4a4"), clip=ClipSearch(norm=norm)) for norm in (2.0, 8.0))
    assert all(squared[name].mse < high[name].mse for name in squared)
    assert all(squared[name].clip_ratio < high[name].clip_ratio for name in squared)


def test_a_scale_a_token_is_measured_and_not_chosen(path):
    seen, inputs = observed(path, named("w4a4-token")), captured(path)
    for name, statistics in seen.items():
        assert statistics.scale is None
        assert statistics.clip_ratio is None
        scales_N1 = arithmetic.token_scales(inputs[name], 4)
        assert statistics.mse == pytest.approx(squared_error(inputs[name], scales_N1, 4), rel=1e-3)


def test_a_scale_that_is_known_is_kept_and_measured(path):
    names = CheckpointReader(path).config.linear_shapes()
    known = {f"{name}.input_scale": np.array([0.25], np.float32) for name in names}
    seen, inputs = observed(path, named("w4a4"), scales=known), captured(path)
    for name, statistics in seen.items():
        assert statistics.scale == 0.25
        assert statistics.mse == pytest.approx(squared_error(inputs[name], np.float32(0.25), 4), rel=1e-3)
        assert statistics.clip_ratio == pytest.approx(7 * 0.25 / statistics.absmax)


@pytest.mark.parametrize("hadamard", ["ffn", "full"])
def test_the_input_of_down_is_seen_as_it_will_be_rotated(path, hadamard):
    inputs, rotation = captured(path), Hadamard.of_width(40).matrix()
    for name, statistics in observed(path, named("w4a4").changed(hadamard=hadamard), hessians=True).items():
        x_NK, rotated = inputs[name].astype(np.float64), name.endswith("down_proj")
        if rotated:
            assert statistics.excess_kurtosis == pytest.approx(kurtosis(x_NK), rel=1e-4)
            x_NK = x_NK @ rotation.T
            assert statistics.rotated_excess_kurtosis == pytest.approx(kurtosis(x_NK), rel=1e-4)
        assert (statistics.rotated_excess_kurtosis is None) == (not rotated)
        assert statistics.absmax == pytest.approx(np.abs(x_NK).max(), rel=1e-5)
        assert statistics.mse == pytest.approx(squared_error(x_NK, statistics.scale, 4), rel=0.03)
        np.testing.assert_allclose(statistics.hessian, 2 / TOKENS * x_NK.T @ x_NK, rtol=1e-4, atol=1e-4)


def test_layers_that_read_one_tensor_share_one_observation(path):
    seen = observed(path, named("w4a4"))
    q, k, v, o, gate, up, down = (seen[name] for name in seen if name.startswith("model.layers.1."))
    assert q is k is v
    assert gate is up
    assert len({id(statistics) for statistics in (q, o, gate, down)}) == 4


def test_what_is_not_quantized_is_not_observed(path):
    scheme = named("w4a4").changed(
        q={"weight_bits": 16, "activation_bits": 16},
        k={"activation_bits": 16},
        down={"weight_bits": 16, "activation_bits": 16},
        **FFN,
    )
    seen = {name.removeprefix("model.layers.0."): s for name, s in observed(path, scheme).items() if ".0." in name}
    assert seen.keys() == {f"self_attn.{site}_proj" for site in "kvo"} | {"mlp.gate_proj", "mlp.up_proj"}
    k, v = seen["self_attn.k_proj"], seen["self_attn.v_proj"]
    assert (k.scale, k.clip_ratio, k.mse) == (None, None, None)
    assert v.scale > 0  # though k, which reads the same and is asked first, has none
    assert k.absmax == v.absmax


def test_a_static_head_reads_the_end_of_the_residual_stream(path):
    scheme = named("w4a16").changed(head={"activation_granularity": "tensor"})
    reader, plan = CheckpointReader(path), Calibration(scheme, ClipSearch())
    assert plan.needs_text
    hidden = HiddenStates(reader, WINDOWS)
    for layer in range(2):
        hidden.advance(build_block(reader, hidden.config, layer))
    statistics, x_ND = plan.observe_head(hidden, build_norm(reader)), captured(path)["lm_head"]
    assert statistics.absmax == pytest.approx(np.abs(x_ND).max(), rel=1e-5)
    assert statistics.mse == pytest.approx(squared_error(x_ND, statistics.scale, 8), rel=0.02)
    assert statistics.tokens == TOKENS


def test_text_is_needed_where_an_input_decides_something():
    needing = {
        "w4a4": True,
        "w4a4-token": True,
        "w4a8": True,
        "w4a16": False,
    }
    for scheme, needs in needing.items():
        assert Calibration(named(scheme), ClipSearch()).needs_text == needs
        assert Calibration(named(scheme), ClipSearch(), hessians=True).needs_text
    assert not Calibration(named("w4a16").changed(head=8, embedding_bits=8), ClipSearch()).needs_text


def test_an_outlier_channel_shows(path):
    def spoil(layer, block):
        if layer == 0:
            block.post_attention_layernorm.weight[5] = 50

    calm = observed(path, named("w4a4"))["model.layers.0.mlp.gate_proj"]
    wild = observed(path, named("w4a4"), change=spoil)["model.layers.0.mlp.gate_proj"]
    assert calm.excess_kurtosis < 1
    assert wild.excess_kurtosis > 10
    assert wild.absmax > 10 * calm.absmax


def test_a_layer_that_saw_no_token_is_named(path):
    with pytest.raises(TextError, match=r"model\.layers\.0\.self_attn\.q_proj saw no token"):
        observed(path, named("w4a4"), windows=[])


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-token"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_named(path, scheme, value):
    def spoil(layer, block):
        if layer == 1:
            block.post_attention_layernorm.weight[5] = value

    with pytest.raises(arithmetic.NonFiniteError, match=r"input of model\.layers\.1\.mlp\.gate_proj"):
        observed(path, named(scheme), change=spoil)
