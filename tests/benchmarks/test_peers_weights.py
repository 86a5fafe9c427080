"""The peers' random weights: against transformers' count of parameters, and the `gguf` package's reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.random_int4 import Matrix, head_matrix, products, random_nibbles
from runtime.bench.shapes import SHAPES
from trainer.config import PRESETS, ModelConfig

MODEL = ModelConfig(96, 64, 160, num_layers=2, num_heads=2, context_length=64)


def transformers_llama(model: ModelConfig) -> LlamaForCausalLM:
    """On the meta device: shapes without data."""
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("shape", ["demo", "1.4b"])
def test_the_products_are_those_of_the_model(shape: str) -> None:
    model = PRESETS[shape].model
    linear = [tuple(m.weight.shape) for m in transformers_llama(model).modules() if isinstance(m, torch.nn.Linear)]
    assert sorted((matrix.N, matrix.K) for matrix in products(model)) == sorted(linear)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_peers_have_the_shapes_of_the_native_engine(shape: str) -> None:
    ours, theirs = SHAPES[shape], PRESETS[shape].model
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_hidden_layers) == (
        theirs.vocab_size,
        theirs.hidden_size,
        theirs.intermediate_size,
        theirs.num_layers,
    )
    assert ours.num_attention_heads == ours.num_key_value_heads == theirs.num_heads
    assert (ours.head_dim, ours.rope_theta, ours.rms_norm_eps) == (
        theirs.head_dim,
        theirs.rope_theta,
        theirs.norm_eps,
    )
    assert not ours.tie_word_embeddings


@pytest.mark.parametrize("zero", [0, 8])
def test_codes_are_uniform_without_the_sixteenth(zero: int) -> None:
    packed = random_nibbles(np.random.default_rng(0), 150_000, zero=zero)
    nibbles = np.concatenate([packed & 15, packed >> 4]).astype(int)
    codes = nibbles - 8 if zero else np.where(nibbles > 7, nibbles - 16, nibbles)
    values, counts = np.unique(codes, return_counts=True)
    assert values.tolist() == list(range(-7, 8))
    assert counts == pytest.approx(np.full(15, 20_000), rel=0.04)  # over five standard deviations


@pytest.mark.parametrize("summed", [1, 3])
def test_outputs_have_unit_variance(summed: int) -> None:
    rng = np.random.default_rng(1)
    matrix = Matrix("o", N=400, K=256, summed=summed)
    codes_NK = rng.integers(-7, 8, (matrix.N, matrix.K))
    x_K = sum(rng.standard_normal(matrix.K) for _ in range(summed))
    assert np.var(codes_NK @ x_K * matrix.scale) == pytest.approx(1, rel=0.3)


def test_a_gguf_file_is_a_whole_llama_in_q4_0(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra 'bench'")
    from benchmarks.random_gguf import write_random_gguf

    path = tmp_path / "new" / "model.gguf"
    write_random_gguf(path, MODEL, context_length=4096)
    reader = gguf.GGUFReader(path)
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, MODEL.num_layers)
    wanted = {}
    for name, parameter in transformers_llama(MODEL).named_parameters():
        wanted[names.get_name(name, try_suffixes=(".weight",))] = tuple(parameter.shape)
    values = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert {name: array.shape for name, array in values.items()} == wanted

    for name, array in values.items():
        if array.ndim == 1:
            assert (array == 1).all()
        else:
            assert np.unique(array) * 7 / array.max() == pytest.approx(np.arange(-7, 8), abs=1e-6), name
            assert 0.5 < array.std() * np.sqrt(array.shape[1]) < 1.05, name
    fields = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 32,
        "llama.context_length": 4096,
        "llama.vocab_size": 96,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {name: reader.fields[name].contents() for name in fields} == fields
    assert np.isclose(reader.fields["llama.attention.layer_norm_rms_epsilon"].contents(), MODEL.norm_eps)


def test_q4_0_refuses_a_width_that_is_not_of_whole_blocks() -> None:
    pytest.importorskip("gguf", reason="needs the extra 'bench'")
    from benchmarks.random_gguf import random_q4_0

    with pytest.raises(ValueError, match="head: Q4_0 has blocks of 32, which do not divide a reduction of 80"):
        random_q4_0(np.random.default_rng(0), head_matrix(ModelConfig(96, 80, 160, 2, 2, 64)))
