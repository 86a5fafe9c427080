"""The torch model of a checkpoint against transformers, against the numpy specification bit for bit, and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import ODD_WIDTHS, write_4bit
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from quant import arithmetic
from quant.format import CheckpointReader
from quant.hadamard import Hadamard
from quant.model import SimulatedLinear, load_model, simulate_kv, token_scales, transformers_config
from quant.scheme import named
from quant.weights import QuantizedLinear, QuantizedWeight

IDS = torch.arange(30)[None] * 7 % 83
LARGEST = 3.4028234663852886e38


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_precision_is_what_transformers_computes(make_checkpoint, tied, dtype):
    path = make_checkpoint(dtype=dtype, tie_word_embeddings=tied)
    ours, theirs = load_model(CheckpointReader(path)), LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


def random_linear(random, outputs, reduction, weight_bits, per_channel, input_bits, static, rotated=False):
    lowest, highest = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    codes_MK = random.integers(lowest, highest + 1, (outputs, reduction)).astype(np.int8)
    scale = np.exp(random.normal(size=outputs if per_channel else 1)).astype(np.float32)
    weight = QuantizedWeight.from_codes(codes_MK, weight_bits, arithmetic.round_to_bfloat16(scale))
    return QuantizedLinear(weight, input_bits, np.float32(0.171875) if static else None, rotated)


def specified(x_NK, linear):
    weight = linear.weight
    return arithmetic.quantized_linear(
        x_NK, linear.input_scale, weight.codes, weight.scale, linear.input_bits, weight.bits
    )


@pytest.mark.parametrize(("rows", "outputs", "reduction"), [(1, 1, 1), (3, 5, 7), (8, 64, 333), (17, 33, 2048)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("input_bits", "weight_bits"), [(4, 4), (8, 4), (8, 8)])
def test_a_simulated_linear_has_the_bits_of_the_specification(
    rows, outputs, reduction, per_channel, static, input_bits, weight_bits
):
    random = np.random.default_rng(reduction)
    linear = random_linear(random, outputs, reduction, weight_bits, per_channel, input_bits, static)
    simulated = SimulatedLinear(linear)
    for size in (0.01, 1, 100):
        x_NK = (size * random.normal(size=(rows, reduction))).astype(np.float32)
        x_NK[0, : reduction // 2] = np.float32(2.5 * 0.171875)  # ties under the static scale
        x_NK[-1] = 0
        assert simulated(torch.from_numpy(x_NK)).numpy().tobytes() == specified(x_NK, linear).tobytes()


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.sampled_from([4, 8]),
)
@example(np.zeros((1, 4), np.float32), 4)
@example(np.full((1, 1), 1e-45, np.float32), 4)
@example(np.full((2, 3), LARGEST, np.float32), 8)
def test_scales_of_tokens_are_those_of_the_specification(x_NK, bits):
    simulated = token_scales(torch.from_numpy(x_NK), bits).numpy()
    assert simulated.tobytes() == arithmetic.token_scales(x_NK, bits).tobytes()


def test_a_simulated_linear_divides_rather_than_multiplying_by_the_reciprocal():
    for scale in np.arange(1, 500, dtype=np.float32) / 977:
        one = QuantizedWeight.from_codes(np.ones((1, 1), np.int8), 4, np.ones(1, np.float32))
        x = np.float32(3.5) * scale
        (y,) = SimulatedLinear(QuantizedLinear(one, 4, scale))(torch.tensor([x]))
        assert y == arithmetic.quantize(x, scale) * scale


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_alone_are_a_float_product(bits, rotated):
    random = np.random.default_rng(bits)
    linear = random_linear(random, 9, 40, bits, True, 16, False, rotated)
    x_NK = random.normal(size=(5, 40)).astype(np.float32)
    turned_NK = Hadamard.of_width(40).apply(x_NK.astype(np.float64)) if rotated else x_NK
    wanted = turned_NK @ linear.weight.dequantized().T.astype(np.float64)
    np.testing.assert_allclose(SimulatedLinear(linear)(torch.from_numpy(x_NK)).numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("width", [6, 40, 688])
def test_a_rotated_input_is_quantized_after_its_rotation(width, static):
    random = np.random.default_rng(width)
    linear = random_linear(random, 9, width, 4, False, 8, static, rotated=True)
    simulated = SimulatedLinear(linear)
    x_NK = random.normal(size=(5, width)).astype(np.float32)
    turned_NK = simulated.rotation(torch.from_numpy(x_NK)).numpy()
    np.testing.assert_allclose(turned_NK, Hadamard.of_width(width).apply(x_NK), atol=4e-6)
    assert simulated(torch.from_numpy(x_NK)).numpy().tobytes() == specified(turned_NK, linear).tobytes()


def test_a_reduction_that_is_not_exact_is_refused():
    width = arithmetic.MAX_REDUCTION + 1
    weight = QuantizedWeight(np.zeros((1, width // 2), np.uint8), width, 4, np.ones(1, np.float32))
    with pytest.raises(ValueError, match=f"{width} exceeds"):
        SimulatedLinear(QuantizedLinear(weight, 4, np.float32(1)))


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3),
        elements=st.one_of(st.floats(-8, 8, width=32), st.floats(-(2.0**126), 2.0**126, width=32)),
    ),
    st.sampled_from([4, 8]),
)
@example(np.zeros((2, 3), np.float32), 4)
@example(np.array([LARGEST, -LARGEST], np.float32), 4)
@example(np.array([1e-45, -1e-45, 0], np.float32), 8)
@example(np.array([-1, 0.5, 1.5, 14], np.float32), 4)
def test_simulated_keys_and_values_have_the_bits_of_the_specification(x_NC, bits):
    wanted = arithmetic.dequantize_kv(*arithmetic.quantize_kv(x_NC, bits))
    assert simulate_kv(torch.from_numpy(x_NC), bits).numpy().tobytes() == wanted.tobytes()


# ---- whole models ----

SCHEMES = {
    "w4a4": named("w4a4"),
    "w4a4-token": named("w4a4-token"),
    "w4a8": named("w4a8").changed(kv_bits=8),
    "w4a16": named("w4a16").changed(hadamard="ffn"),
    "kv4": named("w4a16").changed(kv_bits=4),
    "everything": named("w4a4").changed(
        head=8, embedding_bits=8, kv_bits=4, hadamard="ffn", down={"weight_bits": 8, "activation_bits": 8}
    ),
}


def cached(values_BHLC, bits):
    """What a cache of so many bits gives back."""
    return torch.from_numpy(arithmetic.dequantize_kv(*arithmetic.quantize_kv(values_BHLC.numpy(), bits)))


def oracle(reader):
    """transformers' own model: each quantized layer by the numpy specification, keys and values through its cache."""
    kv_bits = reader.scheme.kv_bits

    def attend(module, query, key, value, mask, **options):
        if kv_bits == 4:
            turn = Hadamard.of_width(reader.config.head_dim).apply
            query, key = torch.from_numpy(turn(query.numpy())), torch.from_numpy(turn(key.numpy()))
        if kv_bits < 16:
            key, value = cached(key, kv_bits), cached(value, kv_bits)
        return eager_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("numpy", attend)
    AttentionMaskInterface.register("numpy", eager_mask)
    config = transformers_config(reader)
    config._attn_implementation = "numpy"
    model = LlamaForCausalLM(config)
    state = {name: reader.norm(name) for name in reader.config.norm_names()}
    embedding = reader.embedding()
    state["model.embed_tokens.weight"] = (
        embedding.dequantized() if isinstance(embedding, QuantizedWeight) else embedding
    )
    for name in [*reader.config.linear_shapes(), "lm_head"]:
        linear = reader.head() if name == "lm_head" else reader.linear(name)
        if not isinstance(linear, QuantizedLinear):
            state[f"{name}.weight"] = linear
            continue
        state[f"{name}.weight"] = linear.weight.dequantized()

        def forward(x, linear=linear):
            rows = x.flatten(0, -2).numpy()
            if linear.rotated:
                rows = Hadamard.of_width(rows.shape[1]).apply(rows)
            y = rows @ linear.weight.dequantized().T if linear.input_bits == 16 else specified(rows, linear)
            return torch.from_numpy(y).reshape(*x.shape[:-1], -1)

        model.get_submodule(name).forward = forward
    state = {name: torch.from_numpy(np.asarray(values, np.float32)) for name, values in state.items()}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("shape", [{}, {**ODD_WIDTHS, "intermediate_size": 52}], ids=["even widths", "odd widths"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_is_transformers_with_numpy_layers(tmp_path, scheme, shape):
    reader = CheckpointReader(write_4bit(tmp_path, scheme=SCHEMES[scheme], **shape))
    with torch.no_grad():
        simulated, wanted = load_model(reader)(IDS).logits, oracle(reader)(IDS).logits
    # Attention and float products sum in another order; where that turns a tie, a step of the next layer shows.
    differences = (simulated - wanted).abs() / wanted.abs().max()
    assert differences.median() < 1e-6
    assert differences.max() < 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_reads_the_codes_of_the_embedding(tmp_path, bits):
    head = {
        "weight_bits": bits,
        "weight_granularity": "channel",
        "activation_bits": 8,
        "activation_granularity": "token",
    }
    scheme = named("w4a4").changed(embedding_bits=bits, head=head)
    reader = CheckpointReader(write_4bit(tmp_path, scheme=scheme, tie_word_embeddings=True))
    model = load_model(reader)
    x_ND = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert model.lm_head(x_ND).numpy().tobytes() == specified(x_ND.numpy(), reader.head()).tobytes()
    table = reader.embedding().dequantized()
    np.testing.assert_array_equal(model.model.embed_tokens(IDS).numpy(), table[IDS.numpy()])
