"""The torch model of a checkpoint against transformers, against numpy bit for bit, and against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from quant import arithmetic
from quant.convert import quantize_checkpoint
from quant.format import QuantizedLinear, read_checkpoint
from quant.model import SimulatedLinear, load_model
from quant.perplexity import measure_perplexity
from quant.scheme import named

IDS = torch.arange(30)[None] * 7 % 256


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_precision_is_what_transformers_computes(make_checkpoint, tied, dtype):
    path = make_checkpoint(dtype=dtype, tie_word_embeddings=tied)
    ours, theirs = load_model(read_checkpoint(path)), LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(("rows", "outputs", "reduction"), [(1, 1, 1), (3, 5, 7), (8, 64, 333), (17, 33, 2048)])
def test_simulated_linear_has_the_bits_of_the_specification(rows, outputs, reduction):
    random = np.random.default_rng(reduction)
    codes_MK = random.integers(-8, 8, (outputs, reduction)).astype(np.int8)
    for _ in range(5):
        w_scale = arithmetic.tensor_scale(random.uniform(0.01, 3))
        x_scale = arithmetic.tensor_scale(random.uniform(0.01, 9))
        x_NK = random.normal(size=(rows, reduction)).astype(np.float32)
        x_NK[0, : reduction // 2] = np.float32(0.5) * x_scale  # ties
        linear = SimulatedLinear(QuantizedLinear(arithmetic.pack(codes_MK), reduction, w_scale, x_scale))
        simulated = linear(torch.from_numpy(x_NK)).numpy()
        assert simulated.tobytes() == arithmetic.quantized_linear(x_NK, x_scale, codes_MK, w_scale).tobytes()

        sums = arithmetic.quantize(x_NK, x_scale).astype(np.float64) @ codes_MK.T.astype(np.float64)
        np.testing.assert_array_equal(simulated, (sums * np.float64(x_scale * w_scale)).astype(np.float32))


def test_simulated_linear_divides_rather_than_multiplying_by_the_reciprocal():
    one = arithmetic.pack(np.ones((1, 1), np.int8))
    for scale in np.arange(1, 500, dtype=np.float32) / 977:
        x = np.float32(3.5) * scale
        (y,) = SimulatedLinear(QuantizedLinear(one, 1, np.float32(1), scale))(torch.tensor([x]))
        assert y == arithmetic.quantize(x, scale) * scale


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_simulated_linear_agrees_on_what_is_not_finite(value):
    random = np.random.default_rng(1)
    codes_MK, scale = random.integers(-8, 8, (9, 40)).astype(np.int8), np.float32(0.5)
    codes_MK[4] = 0  # NaN times zero is NaN
    x_NK = random.normal(size=(6, 40)).astype(np.float32)
    x_NK[2, 7] = x_NK[5, 0] = value
    linear = SimulatedLinear(QuantizedLinear(arithmetic.pack(codes_MK), 40, np.float32(0.25), scale))
    simulated = linear(torch.from_numpy(x_NK)).numpy()
    np.testing.assert_array_equal(simulated, arithmetic.quantized_linear(x_NK, scale, codes_MK, np.float32(0.25)))
    assert np.isnan(simulated[[2, 5]]).all() == np.isnan(value)
    assert not np.isnan(simulated[[0, 1, 3, 4]]).any()


def test_simulated_linear_refuses_a_reduction_that_is_not_exact():
    width = arithmetic.MAX_REDUCTION + 2
    with pytest.raises(ValueError, match=f"{width} exceeds"):
        SimulatedLinear(QuantizedLinear(np.zeros((1, width // 2), np.uint8), width, np.float32(1), np.float32(1)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_four_bit_model_is_the_source_with_numpy_linears(make_checkpoint, tmp_path, tied):
    """The oracle: transformers' own model, each of its linear layers replaced by the numpy specification."""
    quantize_checkpoint(make_checkpoint(tie_word_embeddings=tied), tmp_path / "out", named("w4a4"))
    written = read_checkpoint(tmp_path / "out")
    oracle = LlamaForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    for name, linear in written.linears.items():

        def forward(x, linear=linear):
            rows = x.flatten(0, -2).numpy()
            y = arithmetic.quantized_linear(rows, linear.input_scale, linear.codes, linear.weight_scale)
            return torch.from_numpy(y).reshape(*x.shape[:-1], -1)

        oracle.get_submodule(name).forward = forward
    with torch.no_grad():
        simulated, wanted = load_model(written)(IDS).logits, oracle(IDS).logits
    assert simulated.numpy().tobytes() == wanted.numpy().tobytes()


def test_perplexity_by_its_definition(checkpoint_path):
    model = load_model(read_checkpoint(checkpoint_path)).double()
    cut = [[int(i) for i in np.random.default_rng(n).integers(0, 256, length)] for n, length in enumerate((32, 2, 19))]
    losses = []
    for window in cut:
        log_probabilities = model(torch.tensor([window])).logits[0].log_softmax(-1)
        losses += [-float(log_probabilities[i, token]) for i, token in enumerate(window[1:])]
    measured = measure_perplexity(load_model(read_checkpoint(checkpoint_path)), cut)
    assert measured.tokens == len(losses) == 50
    assert measured.value == pytest.approx(math.exp(sum(losses) / 50), rel=1e-5)


def test_perplexity_does_not_depend_on_how_many_logits_are_held(checkpoint_path, monkeypatch):
    model, window = load_model(read_checkpoint(checkpoint_path)), [IDS[0].tolist()]
    whole = measure_perplexity(model, window)
    monkeypatch.setattr("quant.perplexity.LOGIT_ROWS", 4)
    assert measure_perplexity(model, window).value == pytest.approx(whole.value, rel=1e-6)


def test_perplexity_of_a_model_that_computes_nan_is_refused(checkpoint_path):
    model = load_model(read_checkpoint(checkpoint_path))
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(arithmetic.NonFiniteError, match="perplexity over 29 tokens is nan"):
        measure_perplexity(model, [IDS[0].tolist()])
    with pytest.raises(ValueError, match="at least one window"):
        measure_perplexity(model, [])
