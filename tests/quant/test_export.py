"""Exports against what transformers makes of them, against compressed-tensors' own packing, and against float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import END, ODD_WIDTHS, refusal, write_4bit, write_byte_level_tokenizer, write_full_precision
from click.testing import CliRunner
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from benchmarks.check_vllm_export import UnquantizedInputs
from quant import arithmetic
from quant.export import export_checkpoint, pack_words
from quant.export_cli import export
from quant.format import CheckpointReader
from quant.llama import CheckpointError
from quant.model import load_model
from quant.scheme import LINEAR_SITES, Scheme, named
from quant.weights import QuantizedLinear, QuantizedWeight

IDS = torch.arange(1, 40)[None]
EIGHT_BITS = {
    "weight_bits": 8,
    "weight_granularity": "channel",
    "activation_bits": 8,
    "activation_granularity": "token",
}
MIXED = named("w4a4-token").changed(down=EIGHT_BITS, head=8)


def exported(tmp_path: Path, scheme: Scheme, activations: str = "none", **overrides: Any) -> tuple[Path, Path]:
    """A random checkpoint and its export."""
    source = write_4bit(tmp_path / "source", scheme=scheme, **overrides)
    export_checkpoint(source, tmp_path / "out", activations=activations)
    return source, tmp_path / "out"


def stock_linear(x_NK: np.ndarray, weight: QuantizedWeight, bits: int) -> np.ndarray:
    """compressed-tensors' definition of a linear layer with dynamic per-token inputs, in float64 but for the codes.

    The scale of a token is its absmax over half the width of the range, 7.5 for 4 bits, not over the highest code.
    """
    lowest, highest = arithmetic.code_range(bits)
    scale_N1 = np.abs(x_NK).max(axis=-1, keepdims=True) / np.float32((highest - lowest) / 2)
    codes_NK = np.clip(np.rint(x_NK / scale_N1), lowest, highest)
    return (codes_NK * scale_N1.astype(np.float64)) @ weight.dequantized().astype(np.float64).T


@pytest.mark.parametrize(
    ("scheme", "overrides"),
    [
        (named("w4a16"), {}),
        (named("w4a16"), ODD_WIDTHS),
        (named("w4a16"), {"tie_word_embeddings": True}),
        (named("w4a4").changed(kv_bits=4), {}),
        (named("w4a4-token").changed(down={"weight_bits": 16, "activation_bits": 16}, head=4), {}),
    ],
    ids=["w4a16", "odd-widths", "tied", "w4a4-kv4", "down16-head4"],
)
def test_transformers_computes_the_simulation_with_inputs_of_16_bits(tmp_path, scheme, overrides):
    source, out = exported(tmp_path, scheme, **overrides)
    ours = load_model(UnquantizedInputs(source))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheme", [named("w4a4"), named("w4a4-token"), MIXED], ids=["w4a4", "w4a4-token", "mixed"])
def test_transformers_quantizes_the_inputs_of_each_token_by_its_own_definition(tmp_path, scheme):
    source, out = exported(tmp_path, scheme, "token")
    reader, model = CheckpointReader(source), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def keep(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        seen.setdefault(name, (x[0].numpy(), y[0].numpy()))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, inputs, y, name=name: keep(name, *inputs, y))
    with torch.inference_mode():
        model(IDS)
        zeros = model.model.layers[0].mlp.up_proj(torch.zeros(1, 2, 32))
    quantized = [name for name in seen if isinstance(reader.linear(name), QuantizedLinear)]
    assert len(quantized) == (15 if scheme is MIXED else 14)
    for name in quantized:
        linear = reader.linear(name)
        x_NK, y_NM = seen[name]
        np.testing.assert_allclose(y_NM, stock_linear(x_NK, linear.weight, linear.input_bits), atol=1e-4, err_msg=name)
    assert not zeros.any()


def test_packed_words_are_what_compressed_tensors_unpacks(tmp_path):
    source, out = exported(tmp_path, named("w4a4-token"), **ODD_WIDTHS)
    tensors, reader = load_file(out / "model.safetensors"), CheckpointReader(source)
    for name in reader.config.linear_shapes():
        weight = reader.linear(name).weight
        assert tensors[f"{name}.weight_shape"].tolist() == list(weight.shape)
        words = torch.from_numpy(tensors[f"{name}.weight_packed"])
        assert words.dtype == torch.int32
        np.testing.assert_array_equal(unpack_from_int32(words, 4, torch.Size(weight.shape)).numpy(), weight.codes)
        scale = tensors[f"{name}.weight_scale"]
        assert scale.dtype == "bfloat16"
        np.testing.assert_array_equal(scale.astype(np.float32), weight.scale[:, None])


@given(st.integers(1, 5), st.integers(1, 40), st.randoms(use_true_random=False))
def test_words_hold_eight_codes_each_plus_eight(rows, columns, random):
    codes_MK = np.array([[random.randint(-8, 7) for _ in range(columns)] for _ in range(rows)], np.int8)
    words = pack_words(arithmetic.pack(codes_MK))
    assert words.shape == (rows, -(-columns // 8))
    filled = np.pad(codes_MK, ((0, 0), (0, -columns % 8)))
    for row, word_row in zip(filled.tolist(), words.tolist(), strict=True):
        for i, word in enumerate(word_row):
            assert word % 2**32 == sum((row[8 * i + j] + 8) * 16**j for j in range(8))


def test_a_mixed_export_is_never_read_with_the_bits_of_another_group(tmp_path):
    """transformers 5.24, asked for dequantized weights, unpacks every layer as the first group says; 5.0 does not."""
    source, out = exported(tmp_path, MIXED, "token")
    try:
        model = AutoModelForCausalLM.from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        return
    model(IDS)
    weights = CheckpointReader(source).linear("model.layers.1.mlp.down_proj").weight.dequantized()
    stock = model.model.layers[1].mlp.down_proj.weight.float().numpy()
    np.testing.assert_allclose(stock, weights, rtol=2**-8)


@pytest.mark.parametrize(
    ("scheme", "activations", "words"),
    [
        (named("w4a4").changed(hadamard="ffn"), "none", "quantize with --hadamard none"),
        (named("w4a16").changed(hadamard="full"), "none", "quantize with --hadamard none"),
        (named("w4a16").changed(embedding_bits=8), "none", "quantize with --embedding 16"),
        (named("w4a16").changed(v=EIGHT_BITS), "token", "vLLM holds q, k, v in one matrix"),
        (named("w4a16").changed(up={"weight_bits": 16}), "none", "gate 4 and 16; up 16 and 16"),
        (named("w4a16").changed(head=8), "none", "--activations token"),
        (named("w4a16"), "token", "the scheme w4a16 quantizes no inputs"),
        (named("w4a16"), "some", "known: none, token"),
    ],
)
def test_what_a_stock_engine_would_compute_wrongly_is_refused(tmp_path, scheme, activations, words):
    source = write_4bit(tmp_path / "source", scheme=scheme)
    with pytest.raises(CheckpointError, match="cannot be exported") as caught:
        export_checkpoint(source, tmp_path / "out", activations=activations)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_scheme_of_the_cache_alone_is_refused(tmp_path):
    sites = {site: {"weight_bits": 16} for site in LINEAR_SITES}
    source = write_4bit(tmp_path / "source", scheme=named("w4a16").changed(kv_bits=4, **sites))
    with pytest.raises(CheckpointError, match="KV cache"):
        export_checkpoint(source, tmp_path / "out")


def test_full_precision_and_exports_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not quantized: transformers and vLLM load it as it is"):
        export_checkpoint(write_full_precision(tmp_path / "full"), tmp_path / "out")
    _, out = exported(tmp_path, named("w4a16"))
    assert "quantized by 'compressed-tensors'" in refusal(out)


def test_an_export_appears_whole_or_not_at_all(tmp_path):
    source = write_4bit(tmp_path / "source", write_tokenizer=write_byte_level_tokenizer, vocab_size=320)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export_checkpoint(source, tmp_path / "full")
    export_checkpoint(source, tmp_path / "parent" / "out")
    names = {file.name for file in (tmp_path / "parent" / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "osp.json", "tokenizer.json"}
    assert END in (tmp_path / "parent" / "out" / "tokenizer.json").read_text()

    weights = load_file(source / "osp.safetensors")
    weights["model.layers.1.mlp.down_proj.weight_scale"][0] = np.nan
    save_file(weights, source / "osp.safetensors")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_scale"):
        export_checkpoint(source, tmp_path / "new" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_says_what_became_other(tmp_path):
    source = write_4bit(tmp_path / "source", scheme=named("w4a4").changed(kv_bits=4))
    arguments = [str(source), "--format", "compressed-tensors", "--out"]
    told = CliRunner().invoke(export, [*arguments, str(tmp_path / "a")])
    assert told.exit_code == 0, told.output
    assert "4-bit weights, 16-bit inputs: q, k, v, o, gate, up, down" in told.output
    assert "16 bits: head, embedding" in told.output
    assert "inputs of q, k, v, o, gate, up, down keep 16 bits" in told.output
    assert "it will have 16 bits, not 4" in told.output
    told = CliRunner().invoke(export, [*arguments, str(tmp_path / "b"), "--activations", "token", "--json"])
    report = json.loads(told.output)
    assert report["groups"] == [
        {"weight_bits": 4, "input_bits": 4, "sites": ["q", "k", "v", "o", "gate", "up", "down"]}
    ]
    assert any("calibrated input scales are dropped" in note for note in report["notes"])
    assert any("Humming" in note for note in report["notes"])
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert report["bytes"] == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "gguf"], "unknown format 'gguf'; there is: compressed-tensors, onnx"),
        ([], "Missing option '--format'"),
    ],
)
def test_other_formats_are_refused_with_what_there_is(tmp_path, options, words):
    told = CliRunner().invoke(export, [str(tmp_path), "--out", str(tmp_path / "out"), *options])
    assert told.exit_code == 2
    assert words in told.output
