"""Rounding that can be trained: the forward pass against the integers, the gradients against the published formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import write_4bit, write_full_precision
from torch import nn

from quant import arithmetic
from quant.format import CheckpointReader, QuantizedLinear, QuantizedWeight
from quant.model import HadamardTransform, SimulatedLinear, load_model
from quant.scheme import LinearScheme, named
from quant.trainable import LearnedScale, Quantize, TrainableQuantizedLinear, parameter_groups, trainable_model

SCHEMES = {
    "w4a4": named("w4a4"),
    "w4a4, rotated, kv 4": named("w4a4").changed(hadamard="ffn", kv_bits=4),
    "w4a4-token": named("w4a4-token"),
    "w4a8, kv 8": named("w4a8").changed(kv_bits=8),
    "w4a16": named("w4a16"),
    "mixed": named("w4a4").changed(down={"weight_bits": 16, "activation_bits": 16}, o={"activation_bits": 8}),
}


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_those_of_learned_step_sizes(bits):
    """Esser et al., arXiv 1902.08153, equations 3 and 5, for the value that is codes times scale."""
    rng = np.random.default_rng(0)
    lowest, highest = arithmetic.code_range(bits)
    values = rng.normal(0, 0.7 * highest, (5, 7))
    x = torch.tensor(values, requires_grad=True)
    scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    upstream = rng.normal(size=(5, 7))
    (Quantize.apply(x, scale, bits) * scale * torch.tensor(upstream)).sum().backward()

    quotient = values / 1.3
    inside = (quotient >= lowest) & (quotient <= highest)
    assert inside.any()
    assert not inside.all()
    of_scale = np.where(inside, np.rint(quotient) - quotient, np.where(quotient < lowest, lowest, highest))
    np.testing.assert_allclose(x.grad.numpy(), upstream * inside, rtol=1e-12)
    np.testing.assert_allclose(scale.grad.numpy(), [(upstream * of_scale).sum()], rtol=1e-12)


def test_a_scale_a_row_has_a_gradient_a_row():
    x = torch.randn(4, 6, dtype=torch.float64)
    rows = torch.rand(4, 1, dtype=torch.float64).add(0.2).requires_grad_()
    Quantize.apply(x, rows, 4).mul(rows).square().sum().backward()
    for i in range(4):
        alone = rows[i : i + 1].detach().clone().requires_grad_()
        Quantize.apply(x[i : i + 1], alone, 4).mul(alone).square().sum().backward()
        torch.testing.assert_close(rows.grad[i : i + 1], alone.grad)


def test_a_learned_scale_is_a_bfloat16_number_that_moves():
    learned = LearnedScale(torch.tensor([0.1234567]))
    scale = learned()
    assert arithmetic.round_to_bfloat16(scale.detach().numpy()) == scale.detach().numpy()
    assert scale.item() == pytest.approx(0.1234567, rel=2**-8)
    scale.sum().backward()
    assert learned.logarithm.grad.item() == pytest.approx(0.1234567, rel=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("bits", "inputs"), [(4, "tensor"), (4, "token"), (8, "tensor"), (16, "tensor")])
def test_the_forward_pass_has_the_integers(granularity, rotated, bits, inputs):
    torch.manual_seed(0)
    linear = LinearScheme(4, granularity, bits, inputs)
    weight, x = torch.randn(9, 12), torch.randn(5, 12)
    rotation = HadamardTransform(12) if rotated else None
    rotated_weight = rotation(weight) if rotation else weight
    scale = (rotated_weight.abs().amax(1) if granularity == "channel" else rotated_weight.abs().max()[None]) / 7
    learned = LearnedScale(scale[:, None])
    weight_scale = learned().detach().flatten().numpy()
    input_scale = LearnedScale(torch.tensor([0.3])) if linear.static else None
    codes = arithmetic.quantize(rotated_weight.numpy(), weight_scale[:, None])
    static = np.float32(input_scale().item()) if input_scale else None
    oracle = SimulatedLinear(QuantizedLinear(QuantizedWeight.from_codes(codes, 4, weight_scale), bits, static, rotated))
    trainable = TrainableQuantizedLinear(weight, linear, learned, input_scale, rotation)
    torch.testing.assert_close(trainable(x), oracle(x), rtol=1e-6, atol=1e-6)


def test_what_is_trained_is_the_weight_as_it_will_be_stored():
    torch.manual_seed(0)
    weight, x = torch.randn(9, 12), torch.randn(5, 12)
    parts = (
        LinearScheme(4, "tensor", 4, "tensor"),
        LearnedScale(torch.tensor([[0.3]])),
        LearnedScale(torch.tensor([0.3])),
    )
    trained = TrainableQuantizedLinear(weight, *parts, None, torch.bfloat16)
    written = TrainableQuantizedLinear(weight.bfloat16().float(), *parts, None)
    assert torch.equal(trained(x), written(x))
    trained(x).sum().backward()
    assert trained.weight.grad.abs().max() > 0


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_a_trainable_model_computes_as_the_checkpoint_does(tmp_path, scheme, tied):
    source = CheckpointReader(write_full_precision(tmp_path / "source", tie_word_embeddings=tied))
    quantized = CheckpointReader(write_4bit(tmp_path / "quantized", scheme=scheme, tie_word_embeddings=tied))
    model, oracle = trainable_model(source, quantized, scheme), load_model(quantized)
    # What tuning leaves in 16 bits is bfloat16 in one checkpoint and float32 in the other.
    same = {name: tensor for name, tensor in oracle.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(same, strict=False)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=1e-3, atol=1e-3)


def test_everything_but_the_norms_learns(tmp_path):
    scheme = named("w4a4").changed(hadamard="ffn", kv_bits=4)
    source = CheckpointReader(write_full_precision(tmp_path / "source"))
    quantized = CheckpointReader(write_4bit(tmp_path / "quantized", scheme=scheme))
    model = trainable_model(source, quantized, scheme)
    model(torch.arange(1, 40)[None]).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 0, name
    groups = parameter_groups(model)
    assert {role: len(group) for role, group in groups.items()} == {"matrices": 14, "tables": 2, "scales": 14 + 8}


def test_a_parameter_without_a_group_is_refused(tmp_path):
    source = CheckpointReader(write_full_precision(tmp_path / "source"))
    quantized = CheckpointReader(write_4bit(tmp_path / "quantized"))
    model = trainable_model(source, quantized, named("w4a4"))
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach())
    with pytest.raises(RuntimeError, match="exactly once"):
        parameter_groups(model)
