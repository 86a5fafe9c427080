"""Checkpoints on disk: what is written is read back bit for bit, and whatever is wrong is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import refusal
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from quant import arithmetic
from quant.format import QuantizedLinear, read_checkpoint, read_tokenizer, sha256, write_quantized
from quant.scheme import SchemeError, named

LAYER = "model.layers.1.mlp.down_proj"


def quantized_tensors(path):
    """Random 4-bit linear layers and the source's other parameters."""
    source, random = read_checkpoint(path), np.random.default_rng(0)
    linears = {
        name: QuantizedLinear(
            arithmetic.pack(random.integers(-8, 8, shape).astype(np.int8)),
            shape[1],
            arithmetic.tensor_scale(random.uniform(0.1, 9)),
            arithmetic.tensor_scale(random.uniform(0.1, 9)),
        )
        for name, shape in source.config.linear_shapes().items()
    }
    return linears, source.floats


@pytest.fixture
def packed_path(checkpoint_path, tmp_path):
    """A 4-bit checkpoint."""
    path = tmp_path / "packed"
    path.mkdir()
    shutil.copy(checkpoint_path / "tokenizer.json", path)
    config_json = json.loads((checkpoint_path / "config.json").read_text())
    provenance = {"tokenizer_sha256": sha256(path / "tokenizer.json")}
    write_quantized(path, config_json, named("w4a4"), *quantized_tensors(checkpoint_path), provenance)
    return path


def rewrite(path, change):
    """Applies `change` to the dictionary of tensors in the one safetensors file of `path`."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_quantized_checkpoint_survives_the_disk(checkpoint_path, packed_path):
    linears, floats = quantized_tensors(checkpoint_path)
    read = read_checkpoint(packed_path)
    assert read.precision == "w4a4"
    assert read.linears.keys() == linears.keys()
    for name, linear in linears.items():
        assert same_bits(read.linears[name].packed, linear.packed)
        assert read.linears[name].weight_scale == linear.weight_scale
        assert read.linears[name].input_scale == linear.input_scale
        assert read.linears[name].codes.shape == read.config.linear_shapes()[name]
    assert read.floats.keys() == floats.keys()
    assert all(same_bits(read.floats[name], floats[name]) for name in floats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_full_precision_is_read_as_stored(make_checkpoint, dtype, tied):
    path = make_checkpoint(dtype=dtype, tie_word_embeddings=tied)
    read, model = read_checkpoint(path), LlamaForCausalLM.from_pretrained(path, dtype=dtype)
    assert read.scheme is None
    assert read.precision == str(dtype).removeprefix("torch.")
    state = model.state_dict()
    for name, values in [*read.floats.items(), *((f"{k}.weight", v) for k, v in read.linears.items())]:
        np.testing.assert_array_equal(values.astype(np.float32), state[name].float().numpy())
    np.testing.assert_array_equal(read.head.astype(np.float32), model.lm_head.weight.detach().float().numpy())
    assert ("lm_head.weight" in read.floats) is not tied


def test_rotary_buffers_are_dropped(checkpoint_path):
    wanted = read_checkpoint(checkpoint_path)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        rewrite(checkpoint_path, put(name, np.ones(3, np.float32)))
    read = read_checkpoint(checkpoint_path)
    assert read.floats.keys() == wanted.floats.keys()
    assert read.linears.keys() == wanted.linears.keys()


def test_the_head_of_a_tied_model_may_repeat_the_embedding(make_checkpoint):
    path = make_checkpoint(tie_word_embeddings=True)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "lm_head.weight" not in read_checkpoint(path).floats

    def flip(tensors):
        head = tensors["lm_head.weight"].copy()
        head.view(np.uint16)[-1, -1] ^= 1  # the last bit of the last number
        tensors["lm_head.weight"] = head

    rewrite(path, flip)
    assert "the two differ" in refusal(path)
    embedding = read_checkpoint(make_checkpoint("other", tie_word_embeddings=True)).head
    for other in (embedding.astype(np.float32), embedding[:-1], np.float32(1)):
        rewrite(path, put("lm_head.weight", np.asarray(other)))
        assert "the two differ" in refusal(path)


def test_a_parameter_too_large_for_bfloat16_is_refused(checkpoint_path, tmp_path):
    linears, floats = quantized_tensors(checkpoint_path)
    floats["model.norm.weight"] = np.full(24, np.finfo(np.float32).max)
    with pytest.raises(arithmetic.NonFiniteError, match=r"model\.norm\.weight"):
        write_quantized(tmp_path, {}, named("w4a4"), linears, floats, {})


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
def test_a_stock_engine_refuses_four_bits(packed_path, loader):
    with pytest.raises(OSError, match=re.escape("no file named model.safetensors")):
        loader.from_pretrained(packed_path)


def test_others_may_read_the_weights(packed_path):
    assert (packed_path / "osp.safetensors").stat().st_mode == (packed_path / "config.json").stat().st_mode


def test_old_dtype_key_does_not_contradict_the_new_one(checkpoint_path, tmp_path):
    write_quantized(tmp_path, {"torch_dtype": "float32"}, named("w4a4"), *quantized_tensors(checkpoint_path), {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


# ---- whatever is wrong with the weights ----


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, values):
    return lambda tensors: tensors.update({name: values})


def spoil(name, value):
    return lambda tensors: tensors[name].__setitem__((0,) * tensors[name].ndim, value)


SPOILED = [
    (drop(f"{LAYER}.weight_packed"), f"{LAYER}.weight_packed is missing"),
    (drop(f"{LAYER}.input_scale"), f"{LAYER}.input_scale is missing"),
    (drop("lm_head.weight"), "lm_head.weight is missing"),
    (put("model.layers.9.extra", np.zeros(2, np.float32)), "unexpected tensors: model.layers.9.extra"),
    (put(f"{LAYER}.weight", np.zeros((24, 41), np.float32)), f"unexpected tensors: {LAYER}.weight"),
    (put(f"{LAYER}.weight_packed", np.zeros((24, 20), np.uint8)), "is uint8 [24, 20], expected uint8 [24, 21]"),
    (put(f"{LAYER}.weight_packed", np.zeros((24, 21), np.int8)), "is int8 [24, 21], expected uint8 [24, 21]"),
    (put(f"{LAYER}.weight_scale", np.ones(2, np.float32)), f"{LAYER}.weight_scale is float32 [2]"),
    (put(f"{LAYER}.weight_scale", np.zeros(1, np.float32)), f"{LAYER}.weight_scale must be positive, is 0.0"),
    (put(f"{LAYER}.weight_scale", np.array([0.1], np.float32)), f"{LAYER}.weight_scale is not a bfloat16 number"),
    (put(f"{LAYER}.input_scale", np.array([0.1], np.float32)), f"{LAYER}.input_scale is not a bfloat16 number"),
    (put(f"{LAYER}.input_scale", -np.ones(1, np.float32)), f"{LAYER}.input_scale must be positive, is -1.0"),
    (put(f"{LAYER}.input_scale", np.full(1, np.nan, np.float32)), f"{LAYER}.input_scale: 1 of 1 values are NaN"),
    (spoil("model.norm.weight", np.inf), "model.norm.weight: 1 of 24 values are NaN or infinite"),
    (put("model.norm.weight", np.ones(24, np.float64)), "model.norm.weight is float64"),
]


@pytest.mark.parametrize(("change", "message"), SPOILED, ids=[message for _, message in SPOILED])
def test_spoiled_four_bit_weights_are_refused(packed_path, change, message):
    rewrite(packed_path, change)
    assert message in refusal(packed_path)


def test_a_dirty_padding_nibble_is_refused(packed_path):
    rewrite(packed_path, lambda tensors: tensors[f"{LAYER}.weight_packed"].__setitem__((3, -1), 0x70))
    assert f"{LAYER}.weight_packed has an odd row" in refusal(packed_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(f"{LAYER}.weight", np.nan), f"{LAYER}.weight: 1 of 984 values are NaN or infinite"),
        (drop(f"{LAYER}.weight"), f"{LAYER}.weight is missing"),
        (put(f"{LAYER}.weight", np.zeros((41, 24), ml_dtypes.bfloat16)), f"{LAYER}.weight is bfloat16 [41, 24]"),
        (put("model.layers.0.self_attn.q_proj.bias", np.zeros(24, np.float32)), "q_proj.bias"),
    ],
)
def test_spoiled_full_precision_weights_are_refused(checkpoint_path, change, message):
    rewrite(checkpoint_path, change)
    assert message in refusal(checkpoint_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(packed_path, share):
    file = packed_path / "osp.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert "osp.safetensors cannot be read" in refusal(packed_path)


# ---- whatever is wrong around them ----


def test_what_is_no_checkpoint_is_refused(tmp_path):
    assert "no such directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "no such directory" in refusal(tmp_path / "file")
    assert "config.json is missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "must hold a JSON object" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "osp.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, '{"a":' * 40 + "1" + "}" * 40, "null"])
def test_json_that_python_cannot_hold_is_refused(make_checkpoint, name, content):
    path = make_checkpoint(max_shard_size="8KB")
    (path / name).write_text(content)
    assert f"{name} " in refusal(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda file: os.symlink("nowhere", file)])
@pytest.mark.parametrize("name", ["config.json", "osp.json", "tokenizer.json", "model.safetensors"])
def test_what_is_no_file_is_refused(checkpoint_path, name, make):
    (checkpoint_path / name).unlink(missing_ok=True)
    make(checkpoint_path / name)
    assert f"{name} cannot be read: it is not a file" in refusal(checkpoint_path)


def test_weights_must_be_there(packed_path):
    (packed_path / "osp.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(packed_path)


def test_a_missing_tokenizer_is_refused(packed_path):
    (packed_path / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(packed_path)


def test_another_tokenizer_than_the_recorded_one_is_refused(packed_path):
    file = packed_path / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert "not the one this model was made with" in refusal(packed_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": [1]}', '{"model": {"vocab": 3}}', "not JSON"])
def test_a_damaged_tokenizer_is_refused(checkpoint_path, content):
    (checkpoint_path / "tokenizer.json").write_text(content)
    assert "tokenizer.json cannot be read" in refusal(checkpoint_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_tokenizer_that_may_not_be_read_is_refused(checkpoint_path):
    (checkpoint_path / "tokenizer.json").chmod(0)
    assert "tokenizer.json cannot be read" in refusal(checkpoint_path)


def test_text_is_encoded_whole_and_as_text(tmp_path, tokenizer):
    end = "<|endoftext|>"
    tokenizer.add_special_tokens([end])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 256)])
    text = f"one {end} two, and more than four tokens"
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=200)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path)
    ids = read.encode(text).ids
    assert ids[0] == 256
    assert 256 not in ids[1:]
    assert len(ids) == 1 + len(text)  # a token a byte
    assert read.decode(ids) == text
    assert [len(encoding.ids) for encoding in read.encode_batch(["a", "abc"])] == [2, 4]


def test_a_tokenizer_beyond_the_vocabulary_is_refused(make_checkpoint):
    assert "ids up to 255, but the model's vocabulary is 255" in refusal(make_checkpoint(vocab_size=255))
    path = make_checkpoint("fits", vocab_size=256)
    assert read_checkpoint(path).config.vocab_size == 256
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(path / "tokenizer.json"))
    assert "ids up to 256" in refusal(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; only 'llama' is supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope scaling of type 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"hidden_size": 0}, "hidden_size must be a positive whole number, is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be at most 16384"),
        ({"hidden_size": 10**400}, "hidden_size must be at most 2147483647"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings must be at most 2147483647"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta must be a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"model_type": "x" * 9999}, "only 'llama' is supported"),
        ({"rope_parameters": ["default"]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta must be a positive number, is 'big'"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number, is None"),
        ({"quantization_config": ["osp"]}, "quantization_config must be an object"),
        ({"num_key_value_heads": 3}, "cannot share 3 key/value heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_hidden_layers": 1}, "unexpected tensors: model.layers.1"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"tie_word_embeddings": True}, "ties lm_head.weight to model.embed_tokens.weight, but the two differ"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by 'awq'"),
        ({"quantization_config": {"quant_method": "osp", "format_version": 2}}, "format version 2"),
        ({"quantization_config": {"quant_method": "osp", "format_version": 1}}, "not a quantization scheme"),
    ],
    ids=str,
)
def test_configs_that_no_engine_computes_are_refused(checkpoint_path, edit_config, fields, message):
    edit_config(checkpoint_path, **fields)
    assert message in refusal(checkpoint_path)


def test_a_scheme_this_version_cannot_run_is_refused(packed_path, edit_config):
    quantization = json.loads((packed_path / "config.json").read_text())["quantization_config"]
    for field, value in (("name", "w2a2"), ("name", []), ("name", {}), ("name", None), ("weight_bits", 3)):
        scheme = quantization["scheme"] | {field: value}
        edit_config(packed_path, quantization_config=quantization | {"scheme": scheme})
        assert "scheme" in refusal(packed_path)


@pytest.mark.parametrize("scheme", [None, [], "w4a4", 4, {"name": "w4a4"}], ids=str)
def test_what_is_no_scheme_is_refused(packed_path, edit_config, scheme):
    quantization = json.loads((packed_path / "config.json").read_text())["quantization_config"]
    edit_config(packed_path, quantization_config=quantization | {"scheme": scheme})
    assert "not a quantization scheme" in refusal(packed_path)


def test_unknown_scheme_lists_the_known():
    with pytest.raises(SchemeError, match="known: w4a4"):
        named("w3")
