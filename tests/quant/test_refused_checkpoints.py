"""Checkpoints around their weights: a config, tokenizer or scheme that no engine can use is refused with the reason."""

from __future__ import annotations

import json
import os

import pytest
from checkpoints import ODD_WIDTHS, refusal, write_4bit
from tokenizers import Tokenizer, processors

from quant.format import read_checkpoint, read_tokenizer


@pytest.fixture
def packed_path(tmp_path):
    return write_4bit(tmp_path / "packed")


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
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"tie_word_embeddings": True}, "ties lm_head.weight to model.embed_tokens.weight, but the two differ"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by 'awq'"),
        ({"quantization_config": {}}, "quantized by None"),
    ],
    ids=str,
)
def test_configs_that_no_engine_computes_are_refused(checkpoint_path, edit_config, fields, message):
    edit_config(checkpoint_path, **fields)
    assert message in refusal(checkpoint_path)


def requantized(path, edit_config, **changes):
    quantization = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_config(path, quantization_config=quantization | changes)
    return refusal(path)


@pytest.mark.parametrize("version", [1, 3, "2", None, 2.5, [2]])
def test_another_version_of_the_format_is_refused(packed_path, edit_config, version):
    message = requantized(packed_path, edit_config, format_version=version)
    assert f"quantized format version {version!r}; this reader knows version 2: quantize the model again" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "w2a2"}, "unknown scheme 'w2a2'"),
        ({"name": []}, "unknown scheme []"),
        ({"name": None}, "unknown scheme None"),
        ({"weight_bits": 3}, "not a quantization scheme"),
        ({"kv_bits": 3}, "kv_bits is 3; it must be one of 4, 8, 16"),
        ({"q": 4}, "q: settings by name are wanted, not 4"),
        ({"embedding_bits": 4}, "model.embed_tokens.weight_packed is missing"),
        ({"hadamard": "full"}, "hadamard 'full': the model's width 39 is odd"),
    ],
)
def test_a_scheme_this_version_cannot_run_is_refused(tmp_path, edit_config, changes, message):
    path = write_4bit(tmp_path / "odd", **{**ODD_WIDTHS, "intermediate_size": 52})
    scheme = json.loads((path / "config.json").read_text())["quantization_config"]["scheme"]
    assert message in requantized(path, edit_config, scheme=scheme | changes)


@pytest.mark.parametrize("scheme", [None, [], "w4a4", 4], ids=str)
def test_what_is_no_scheme_is_refused(packed_path, edit_config, scheme):
    assert "the scheme must be an object" in requantized(packed_path, edit_config, scheme=scheme)
    assert "not a quantization scheme" in requantized(packed_path, edit_config, scheme={"name": "w4a4"})
