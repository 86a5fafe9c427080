"""Strictness: a checkpoint whose tensors are not exactly those of its config and scheme is refused by name."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from checkpoints import ODD_WIDTHS, refusal, write_4bit
from safetensors.numpy import load_file, save_file

from quant.format import CheckpointReader, read_checkpoint
from quant.llama import CheckpointError
from quant.scheme import named

LAYER = "model.layers.1.mlp.down_proj"
EVERY_KIND = named("w4a4").changed(
    embedding_bits=4,
    head={"weight_bits": 8, "activation_granularity": "tensor"},
    q={"weight_granularity": "channel"},
    o={"weight_bits": 16, "activation_bits": 16},
    up={"weight_bits": 8, "activation_bits": 8, "activation_granularity": "token"},
    gate={"weight_bits": 8, "activation_bits": 8, "activation_granularity": "token"},
)
"""Packed nibbles of a static layer in down_proj, with 51 inputs and 39 outputs; a scale a row in q_proj."""


@pytest.fixture
def path(tmp_path):
    """A checkpoint of every kind of tensor, of odd widths."""
    return write_4bit(tmp_path, scheme=EVERY_KIND, **ODD_WIDTHS)


def rewrite(path, change):
    """Applies `change` to the dictionary of tensors in the one safetensors file of `path`."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, values):
    return lambda tensors: tensors.update({name: values})


def spoil(name, value):
    return lambda tensors: tensors[name].__setitem__((0,) * tensors[name].ndim, value)


Q, UP, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.embed_tokens"

MISSING = [
    f"{LAYER}.weight_packed",
    f"{LAYER}.weight_scale",
    f"{LAYER}.input_scale",
    f"{UP}.weight_codes",
    f"{EMBEDDING}.weight_packed",
    f"{EMBEDDING}.weight_scale",
    "lm_head.weight_codes",
    "lm_head.weight_scale",
    "lm_head.input_scale",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.norm.weight",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(path, name):
    rewrite(path, drop(name))
    assert f"tensor {name} is missing" in refusal(path)


UNEXPECTED = [
    "model.layers.9.extra",
    f"{LAYER}.weight",  # beside its codes
    f"{LAYER}.weight_codes",
    f"{LAYER}.bias",
    f"{UP}.input_scale",  # its scales are of tokens
    "model.layers.0.self_attn.o_proj.weight_scale",
    "lm_head.weight",
    f"{EMBEDDING}.input_scale",
]


@pytest.mark.parametrize("name", UNEXPECTED)
def test_a_tensor_of_no_parameter_is_named(path, name):
    rewrite(path, put(name, np.ones(1, np.float32)))
    assert f"unexpected tensors: {name}; a Llama of 2 layers" in refusal(path)


def test_many_unexpected_tensors_are_counted(path):
    rewrite(path, lambda tensors: tensors.update({f"x{i}": np.ones(1, np.float32) for i in range(9)}))
    assert "unexpected tensors: x0, x1, x2, x3 and 5 more" in refusal(path)


SHAPES_AND_TYPES = [
    (f"{LAYER}.weight_packed", np.zeros((39, 25), np.uint8), "is uint8 [39, 25], expected uint8 [39, 26]"),
    (f"{LAYER}.weight_packed", np.zeros((39, 51), np.uint8), "is uint8 [39, 51], expected uint8 [39, 26]"),
    (f"{LAYER}.weight_packed", np.zeros((39, 26), np.int8), "is int8 [39, 26], expected uint8 [39, 26]"),
    (f"{UP}.weight_codes", np.zeros((51, 39), np.uint8), "is uint8 [51, 39], expected int8 [51, 39]"),
    (f"{UP}.weight_codes", np.zeros((51, 20), np.int8), "is int8 [51, 20], expected int8 [51, 39]"),
    (f"{LAYER}.weight_scale", np.ones(39, np.float32), "is float32 [39], expected float32 [1]"),
    (f"{LAYER}.weight_scale", np.float32(1), "is float32 [], expected float32 [1]"),
    (f"{Q}.weight_scale", np.ones(1, np.float32), "is float32 [1], expected float32 [18]"),
    (f"{Q}.weight_scale", np.ones((18, 1), np.float32), "is float32 [18, 1], expected float32 [18]"),
    (f"{Q}.weight_scale", np.ones(18, ml_dtypes.bfloat16), "is bfloat16 [18], expected float32 [18]"),
    (f"{EMBEDDING}.weight_scale", np.ones(1, np.float32), "is float32 [1], expected float32 [83]"),
    (f"{LAYER}.input_scale", np.ones(51, np.float32), "is float32 [51], expected float32 [1]"),
    (f"{LAYER}.input_scale", np.ones(1, np.float16), "is float16 [1], expected float32 [1]"),
    ("model.norm.weight", np.ones(39, np.float64), "is float64 [39], expected bfloat16 or float16 or float32 [39]"),
    ("model.norm.weight", np.ones((1, 39), np.float32), "is float32 [1, 39], expected"),
]


@pytest.mark.parametrize(("name", "values", "message"), SHAPES_AND_TYPES)
def test_another_shape_or_type_is_refused(path, name, values, message):
    rewrite(path, put(name, np.asarray(values)))
    assert f"tensor {name} {message}" in refusal(path)


SCALES = [f"{LAYER}.weight_scale", f"{Q}.weight_scale", f"{LAYER}.input_scale", f"{EMBEDDING}.weight_scale"]
NO_SCALES = [
    (0.0, "must be positive, is 0.0"),
    (-1.0, "must be positive, is -1.0"),
    (0.1, "is not a normal bfloat16 number: 0.1"),
    (2.0**-127, "is not a normal bfloat16 number: 5.87"),
    (np.nan, "values are NaN or infinite"),
    (np.inf, "values are NaN or infinite"),
]


@pytest.mark.parametrize("name", [*SCALES, "lm_head.weight_scale", "lm_head.input_scale"])
@pytest.mark.parametrize(("value", "message"), NO_SCALES)
def test_a_scale_that_no_quantizer_writes_is_refused(path, name, value, message):
    rewrite(path, spoil(name, value))
    assert name in refusal(path)
    assert message in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_a_parameter_that_is_not_finite_is_refused(path, name, value):
    rewrite(path, spoil(name, value))
    assert f"{name}: 1 of " in refusal(path)
    assert "values are NaN or infinite, the first at index (0" in refusal(path)


@pytest.mark.parametrize("name", [f"{LAYER}.weight_packed", f"{EMBEDDING}.weight_packed"])
def test_a_dirty_padding_nibble_is_refused(path, name):
    rewrite(path, lambda tensors: tensors[name].__setitem__((3, -1), 0x70))
    assert f"tensor {name} has an odd row whose padding nibble is not zero" in refusal(path)


def test_the_highest_nibble_of_an_even_row_is_no_padding(tmp_path):
    path = write_4bit(tmp_path)
    rewrite(path, lambda tensors: tensors[f"{LAYER}.weight_packed"].__setitem__((3, -1), 0x70))
    assert read_checkpoint(path).linears[LAYER].weight.codes[3, -1] == 7


def test_a_value_is_checked_when_it_is_read_and_names_before(path):
    rewrite(path, spoil("model.norm.weight", np.nan))
    reader = CheckpointReader(path)
    reader.linear(LAYER)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 1 of 39"):
        reader.norm("model.norm.weight")
    rewrite(path, drop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        CheckpointReader(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(f"{LAYER}.weight", np.nan), f"{LAYER}.weight: 1 of 984 values are NaN or infinite"),
        (drop(f"{LAYER}.weight"), f"{LAYER}.weight is missing"),
        (put(f"{LAYER}.weight", np.zeros((41, 24), ml_dtypes.bfloat16)), f"{LAYER}.weight is bfloat16 [41, 24]"),
        (put("model.layers.0.self_attn.q_proj.bias", np.zeros(24, np.float32)), "q_proj.bias"),
        (put(f"{LAYER}.weight_scale", np.ones(1, np.float32)), f"unexpected tensors: {LAYER}.weight_scale"),
    ],
)
def test_spoiled_full_precision_weights_are_refused(checkpoint_path, change, message):
    rewrite(checkpoint_path, change)
    assert message in refusal(checkpoint_path)


def test_the_head_of_a_tied_model_may_repeat_the_embedding(make_checkpoint):
    path = make_checkpoint(tie_word_embeddings=True)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    read = read_checkpoint(path)
    assert read.head.tobytes() == read.embedding.tobytes()

    def flip(tensors):
        head = tensors["lm_head.weight"].copy()
        head.view(np.uint16)[-1, -1] ^= 1  # the last bit of the last number
        tensors["lm_head.weight"] = head

    rewrite(path, flip)
    assert "the two differ" in refusal(path)
    for other in (read.embedding.astype(np.float32), read.embedding[:-1], np.float32(1)):
        rewrite(path, put("lm_head.weight", np.asarray(other)))
        assert "the two differ" in refusal(path)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_beside_a_quantized_embedding_is_refused(tmp_path, bits):
    scheme = named("w4a4").changed(embedding_bits=bits, head=bits)
    path = write_4bit(tmp_path, scheme=scheme, tie_word_embeddings=True)
    rewrite(path, put("lm_head.weight", np.zeros((97, 32), ml_dtypes.bfloat16)))
    assert "the two differ" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, share):
    file = path / "osp.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert "osp.safetensors cannot be read" in refusal(path)
