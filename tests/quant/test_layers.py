"""Rounded layers against the arithmetic that defines them, in float64 where a weight is rotated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quant import arithmetic
from quant.arithmetic import NonFiniteError
from quant.calibrate import Calibration, InputStatistics
from quant.clip import ClipSearch
from quant.format import EMBEDDING, HEAD, CheckpointReader
from quant.hadamard import Hadamard
from quant.layers import LayerQuantizer, rotate
from quant.rounding import choose_scales
from quant.scheme import named

DOWN, GATE = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj"


@pytest.fixture
def reader(make_checkpoint):
    return CheckpointReader(make_checkpoint(intermediate_size=40))


def statistics(width, seed=0):
    """Of inputs whose channels go together, so that GPTQ has something to use."""
    random = np.random.default_rng(seed)
    x_NK = random.normal(size=(200, 6)) @ random.normal(size=(6, width)) + random.normal(size=(200, width)) / 4
    hessian = torch.from_numpy(2 / 200 * x_NK.T @ x_NK).float()
    return InputStatistics(200, 3.0, 0.1, None, np.float32(0.25), 0.6, 0.01, hessian), x_NK


def quantizer(reader, scheme, **settings):
    return LayerQuantizer(reader, Calibration(scheme, settings.pop("clip", ClipSearch()), **settings))


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-token", "w4a8", "w4a16"])
def test_codes_are_the_weight_rounded_by_its_scales(reader, scheme):
    seen, _ = statistics(24)
    tensors, sites = quantizer(reader, named(scheme)).layer(1, {GATE: seen})
    weight_MK = reader.linear(GATE).astype(np.float32)
    scales = tensors[f"{GATE}.weight_scale"]
    assert scales.shape == ((40,) if scheme == "w4a4-token" else (1,))
    codes_MK = arithmetic.unpack(tensors[f"{GATE}.weight_packed"], 24)
    np.testing.assert_array_equal(codes_MK, arithmetic.quantize(weight_MK, scales[:, None]))
    errors_MK = weight_MK - codes_MK * scales[:, None].astype(np.float64)
    assert sites[GATE]["mse"] == pytest.approx(np.square(errors_MK).mean())
    assert sites[GATE]["absmax"] == np.abs(weight_MK).max()
    assert sites[GATE]["method"] == "rtn"
    assert sites[GATE]["input_excess_kurtosis"] == 0.1
    assert sites[DOWN]["input_excess_kurtosis"] is None


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weight_of_down_is_rotated_in_float64_before_it_is_rounded(reader, bits):
    scheme = named("w4a8").changed(hadamard="ffn", down={"weight_bits": bits})
    tensors, _ = quantizer(reader, scheme).layer(1, {})
    exact_MK = reader.linear(DOWN).astype(np.float64) @ Hadamard.of_width(40).matrix().T
    np.testing.assert_array_equal(rotate(reader.linear(DOWN)), exact_MK.astype(np.float32))
    scale = tensors[f"{DOWN}.weight_scale"]
    stored = tensors[f"{DOWN}.weight_packed" if bits == 4 else f"{DOWN}.weight_codes"]
    codes_MK = arithmetic.unpack(stored, 40) if bits == 4 else stored
    np.testing.assert_array_equal(codes_MK, arithmetic.quantize(exact_MK, scale, bits))


def test_sites_of_16_bits_are_left_alone_and_not_rotated(reader):
    scheme = named("w4a4").changed(hadamard="ffn", down={"weight_bits": 16, "activation_bits": 16})
    tensors, sites = quantizer(reader, scheme).layer(1, {})
    np.testing.assert_array_equal(tensors[f"{DOWN}.weight"], reader.linear(DOWN))
    assert f"{DOWN}.weight_scale" not in tensors
    assert DOWN not in sites
    assert len(sites) == 6


def test_gptq_loses_less_of_the_output_under_the_same_scales(reader):
    seen, x_NK = statistics(24)
    weight_MK, losses = reader.linear(GATE).astype(np.float64), {}
    for method in ("rtn", "gptq"):
        tensors, sites = quantizer(reader, named("w4a4"), hessians=method == "gptq").layer(1, {GATE: seen})
        assert sites[GATE]["method"] == method
        codes_MK = arithmetic.unpack(tensors[f"{GATE}.weight_packed"], 24)
        assert tensors[f"{GATE}.weight_scale"] == choose_scales(reader.linear(GATE), GATE, 4, "tensor")
        errors_MK = weight_MK - codes_MK * np.float64(tensors[f"{GATE}.weight_scale"])
        assert sites[GATE]["mse"] == pytest.approx(np.square(errors_MK).mean())
        losses[method] = np.square(x_NK @ errors_MK.T).mean()
    assert losses["gptq"] < 0.7 * losses["rtn"]


def test_where_gptq_cannot_the_codes_are_those_of_rounding(reader):
    seen, _ = statistics(24)
    broken = replace(seen, hessian=torch.full((24, 24), float("inf")))
    tensors, sites = quantizer(reader, named("w4a4"), hessians=True).layer(1, {GATE: broken})
    plain, _ = quantizer(reader, named("w4a4")).layer(1, {GATE: seen})
    assert sites[GATE]["method"] == "rtn"
    assert all(tensors[name].tobytes() == plain[name].tobytes() for name in plain if name.startswith(GATE))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_scales_that_are_known_are_not_searched(reader, method):
    seen, _ = statistics(24)
    known = {f"{GATE}.weight_scale": np.array([0.0625], np.float32)}
    plan = {"scales": known, "hessians": method == "gptq"}
    tensors, sites = quantizer(reader, named("w4a4"), **plan).layer(1, {GATE: seen})
    assert tensors[f"{GATE}.weight_scale"] == 0.0625
    assert tensors[f"{GATE}.input_scale"] == 0.25
    assert sites[GATE]["clip_ratio"] == pytest.approx(7 * 0.0625 / sites[GATE]["absmax"])


def test_the_norm_of_the_error_decides(reader):
    by_norm = [
        quantizer(reader, named("w4a4"), clip=ClipSearch(norm=norm)).layer(1, {})[1][GATE] for norm in (2.0, 6.0)
    ]
    assert by_norm[0]["mse"] < by_norm[1]["mse"]
    assert by_norm[0]["clip_ratio"] < by_norm[1]["clip_ratio"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_have_a_scale_a_row(make_checkpoint, bits, tied):
    reader = CheckpointReader(make_checkpoint(tie_word_embeddings=tied))
    scheme = named("w4a4").changed(head=bits, embedding_bits=bits)
    tensors, sites = quantizer(reader, scheme).tables(None)
    modules = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    assert sites.keys() == modules
    for module in modules:
        weight_VD = reader.embedding() if module == EMBEDDING else reader.head()
        scales = tensors[f"{module}.weight_scale"]
        assert scales.shape == (260,)
        stored = tensors[f"{module}.weight_packed" if bits == 4 else f"{module}.weight_codes"]
        codes_VD = arithmetic.unpack(stored, 24) if bits == 4 else stored
        np.testing.assert_array_equal(codes_VD, arithmetic.quantize(weight_VD, scales[:, None], bits))
    np.testing.assert_array_equal(tensors["model.norm.weight"], reader.norm("model.norm.weight"))


def test_a_static_head_has_its_scale(reader):
    scheme = named("w4a4").changed(head={"activation_granularity": "tensor", "weight_granularity": "tensor"})
    tensors, sites = quantizer(reader, scheme).tables(replace(statistics(24)[0], hessian=None))
    assert tensors[f"{HEAD}.input_scale"] == 0.25
    assert tensors[f"{HEAD}.weight_scale"].shape == (1,)
    assert sites[HEAD]["input_absmax"] == 3.0


def test_a_weight_that_is_not_finite_is_named(reader, monkeypatch):
    weights = {name: reader.linear(name).copy() for name in reader.config.linear_shapes()}
    weights[GATE][3, 4] = np.nan
    monkeypatch.setattr(reader, "linear", weights.__getitem__)
    with pytest.raises(NonFiniteError, match=rf"{GATE}\.weight: 1 of 960 .* \(3, 4\)"):
        quantizer(reader, named("w4a4")).layer(1, {})
