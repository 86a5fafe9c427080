"""Checkpoints on disk: what is written is read back bit for bit, in the layout that is documented."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import BASE, ODD_WIDTHS, write_4bit
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from quant.format import EMBEDDING, HEAD, CheckpointReader, read_checkpoint, write_quantized
from quant.scheme import LINEAR_SITES, named
from quant.weights import QuantizedLinear, QuantizedWeight

TIED_HEAD = {"weight_bits": 4, "weight_granularity": "channel", "activation_bits": 8, "activation_granularity": "token"}
SCHEMES = {
    "w4a4": named("w4a4"),
    "w4a4-token": named("w4a4-token"),
    "w4a8": named("w4a8").changed(kv_bits=4),
    "w4a16": named("w4a16"),
    "8 bits": named("w4a4").changed(**{site: {"weight_bits": 8, "activation_bits": 8} for site in LINEAR_SITES}),
    "mixed": named("w4a4").changed(
        q={"weight_granularity": "channel"},
        o={"weight_bits": 16, "activation_bits": 16},
        gate={"activation_bits": 16},
        down={"weight_bits": 8, "activation_bits": 8, "weight_granularity": "channel"},
    ),
    "tables": named("w4a16").changed(head=8, embedding_bits=4),
    "static head": named("w4a4").changed(head={"weight_granularity": "tensor", "activation_granularity": "tensor"}),
}


def documented(scheme, name, rows, columns, stored):
    """The value that a module has by the text of `quant.format`, made of the tensors in the file."""
    if name == EMBEDDING:
        bits, granularity, input_bits, static = scheme.embedding_bits, "channel", None, False
    else:
        site = getattr(
            scheme, {suffix: site for site, suffix in LINEAR_SITES.items()}.get(name.split(".", 3)[-1], "head")
        )
        bits, granularity, input_bits = site.weight_bits, site.weight_granularity, site.activation_bits
        static = input_bits < 16 and site.activation_granularity == "tensor"
    if bits == 16:
        return stored.pop(f"{name}.weight")
    if bits == 4:
        packed = stored.pop(f"{name}.weight_packed")
        assert (packed.dtype, packed.shape) == (np.uint8, (rows, (columns + 1) // 2))
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)[:, :columns].astype(np.int16)
        codes_MK = np.where(nibbles > 7, nibbles - 16, nibbles)
    else:
        codes_MK = stored.pop(f"{name}.weight_codes")
        assert (codes_MK.dtype, codes_MK.shape) == (np.int8, (rows, columns))
    scale = stored.pop(f"{name}.weight_scale")
    assert (scale.dtype, scale.shape) == (np.float32, (rows if granularity == "channel" else 1,))
    return codes_MK, scale, stored.pop(f"{name}.input_scale")[0] if static else None, input_bits


def require_equal(read, wanted):
    if isinstance(read, QuantizedLinear):
        assert read.input_scale == wanted[2]
        assert read.input_bits == wanted[3]
        read = read.weight
    if isinstance(read, QuantizedWeight):
        np.testing.assert_array_equal(read.codes, wanted[0])
        assert read.scale.tobytes() == wanted[1].tobytes()
    else:
        assert read.dtype == wanted.dtype == ml_dtypes.bfloat16
        assert read.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("shape", [{}, ODD_WIDTHS], ids=["even widths", "odd widths"])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_tensor_is_what_the_layout_says(tmp_path, name, shape):
    scheme = SCHEMES[name]
    path = write_4bit(tmp_path, scheme=scheme, **shape)
    read, stored = read_checkpoint(path), load_file(path / "osp.safetensors")
    assert read.scheme == scheme
    assert read.precision == scheme.label
    for module, (rows, columns) in read.config.linear_shapes().items():
        require_equal(read.linears[module], documented(scheme, module, rows, columns, stored))
    for module, value in ((EMBEDDING, read.embedding), (HEAD, read.head)):
        require_equal(value, documented(scheme, module, *read.config.table_shapes()[module], stored))
    for norm, values in read.norms.items():
        require_equal(values, stored.pop(norm))
    assert not stored


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_has_the_codes_of_the_embedding_and_no_tensors(tmp_path, bits):
    scheme = named("w4a4").changed(embedding_bits=bits, head={**TIED_HEAD, "weight_bits": bits})
    path = write_4bit(tmp_path, scheme=scheme, tie_word_embeddings=True)
    read, stored = read_checkpoint(path), load_file(path / "osp.safetensors")
    assert not [name for name in stored if name.startswith(HEAD)]
    require_equal(read.embedding, documented(scheme, EMBEDDING, 97, 32, stored))
    assert (read.head.input_bits, read.head.input_scale, read.head.rotated) == (8, None, False)
    np.testing.assert_array_equal(read.head.weight.codes, read.embedding.codes)
    np.testing.assert_array_equal(read.head.weight.scale, read.embedding.scale)


def test_a_tied_head_of_16_bits_is_the_embedding(tmp_path):
    read = read_checkpoint(write_4bit(tmp_path, tie_word_embeddings=True))
    assert read.head.tobytes() == read.embedding.tobytes()


@pytest.mark.parametrize("hadamard", ["none", "ffn", "full"])
def test_only_the_input_of_down_proj_is_rotated(tmp_path, hadamard):
    read = read_checkpoint(write_4bit(tmp_path, scheme=named("w4a4").changed(hadamard=hadamard, head=8)))
    for name, linear in [*read.linears.items(), (HEAD, read.head)]:
        assert linear.rotated is (hadamard != "none" and name.endswith("down_proj"))


def test_a_reader_reads_what_is_asked_for(tmp_path):
    whole = read_checkpoint(write_4bit(tmp_path, scheme=SCHEMES["mixed"]))
    reader = CheckpointReader(tmp_path)
    for name, value in whole.linears.items():
        read = reader.linear(name)
        assert type(read) is type(value)
    assert reader.norm("model.norm.weight").tobytes() == whole.norms["model.norm.weight"].tobytes()
    with pytest.raises(KeyError):
        reader.linear("model.layers.2.mlp.down_proj")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_full_precision_is_read_as_stored(make_checkpoint, dtype, tied):
    path = make_checkpoint(dtype=dtype, tie_word_embeddings=tied)
    read, model = read_checkpoint(path), LlamaForCausalLM.from_pretrained(path, dtype=dtype)
    assert read.scheme is None
    assert read.precision == str(dtype).removeprefix("torch.")
    linears = {f"{name}.weight": weight for name, weight in read.linears.items()}
    tables = {f"{EMBEDDING}.weight": read.embedding, f"{HEAD}.weight": read.head}
    state = model.state_dict()
    assert state.keys() == (linears | tables | read.norms).keys()
    for name, values in (linears | tables | read.norms).items():
        np.testing.assert_array_equal(values.astype(np.float32), state[name].float().numpy())
        assert str(values.dtype) == read.precision


def test_rotary_buffers_are_dropped(checkpoint_path):
    wanted = read_checkpoint(checkpoint_path)
    file = checkpoint_path / "model.safetensors"
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for layer in range(2)}
    save_file(load_file(file) | buffers, file)
    read = read_checkpoint(checkpoint_path)
    assert (read.linears.keys(), read.norms.keys()) == (wanted.linears.keys(), wanted.norms.keys())


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LlamaForCausalLM])
def test_a_stock_engine_refuses_quantized_weights(tmp_path, loader):
    with pytest.raises(OSError, match=re.escape("no file named model.safetensors")):
        loader.from_pretrained(write_4bit(tmp_path))


def test_others_may_read_the_weights(tmp_path):
    path = write_4bit(tmp_path)
    assert (path / "osp.safetensors").stat().st_mode == (path / "config.json").stat().st_mode


def test_the_config_is_that_of_the_source_but_for_types_and_quantization(tmp_path):
    source = {**BASE, "torch_dtype": "float32", "head_dim": 8, "unknown": [1]}
    write_quantized(tmp_path, source, named("w4a8"), {}, {"training": {"steps": 7}})
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == {**BASE, "head_dim": 8, "unknown": [1], "dtype": "bfloat16"}
    assert quantization == {"quant_method": "osp", "format_version": 2, "scheme": named("w4a8").to_dict()}
    assert json.loads((tmp_path / "osp.json").read_text()) == {"training": {"steps": 7}}


def test_bits_of_a_weight_add_up(tmp_path):
    """4 bits a weight of the body and one scale a tensor, to the byte."""
    path = write_4bit(tmp_path)
    read, stored = read_checkpoint(path), load_file(path / "osp.safetensors")
    shapes = read.config.linear_shapes()
    body = sum(tensor.nbytes for name, tensor in stored.items() if name.rsplit(".", 1)[0] in shapes)
    assert body == sum(rows * columns // 2 + 8 for rows, columns in shapes.values())
    assert body == sum(linear.nbytes for linear in read.linears.values())
