"""Writes tiny checkpoints with random weights, for the tests of whatever runs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from quant import arithmetic
from quant.format import EMBEDDING, read_checkpoint, sha256, write_json, write_quantized
from quant.hadamard import Hadamard
from quant.llama import CheckpointError, LlamaConfig
from quant.scheme import LINEAR_SITES, SHARED_INPUTS, LinearScheme, Scheme, named
from quant.weights import QuantizedLinear, QuantizedWeight, stored_tensors

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


ODD_WIDTHS = {
    "hidden_size": 39,
    "intermediate_size": 51,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 83,
}
"""Overrides of `BASE`: no width is a multiple of a vector register."""

END = "<|endoftext|>"

TokenizerWriter = Callable[[Path, int], None]


def write_word_tokenizer(root: Path, vocab_size: int) -> None:
    """One word a token: "t0 t1 …", so that texts of known ids are easy to write."""
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "tokenizer.json"))


def write_byte_level_tokenizer(root: Path, vocab_size: int) -> None:
    """A byte-level BPE that puts `END`, id 0, in front; it leaves a few ids of the vocabulary unused."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 20, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Once upon a time there was a little cat. ", "The cat sat on the mat."], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer.save(str(root / "tokenizer.json"))


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Every parameter by full name, float32, of such a size that logits are of order one and attention is not flat."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, (rows, columns) in config.linear_shapes().items():
        weights[f"{name}.weight"] = rng.normal(0, 1.5 / np.sqrt(columns), (rows, columns)).astype(np.float32)
    for name, shape in config.table_shapes().items():
        weights[f"{name}.weight"] = rng.normal(0, 0.3, shape).astype(np.float32)
    for name in config.norm_names():
        weights[name] = rng.uniform(0.5, 1.5, config.hidden_size).astype(np.float32)
    return weights


def write_full_precision(root: Path, dtype: Any = np.float32, seed: int = 0, **overrides: Any) -> Path:
    """A full-precision checkpoint with random weights; `overrides` go into config.json."""
    root.mkdir(parents=True, exist_ok=True)
    config_json = {**BASE, **overrides}
    config = LlamaConfig.from_json(root, config_json)
    weights = {name: weight.astype(dtype) for name, weight in random_weights(config, seed).items()}
    save_file(weights, root / "model.safetensors", metadata={"format": "pt"})
    write_json(root / "config.json", {**config_json, "dtype": str(np.dtype(dtype))})
    write_word_tokenizer(root, config.vocab_size)
    return root


def quantized_weight(weight_MK: NDArray[Any], bits: int, granularity: str) -> QuantizedWeight:
    """Rounds a matrix by its absmax."""
    rows = weight_MK if granularity == "channel" else weight_MK.reshape(1, -1)
    scale = np.array([arithmetic.tensor_scale(float(np.abs(row).max()), bits=bits) for row in rows], np.float32)
    return QuantizedWeight.from_codes(arithmetic.quantize(weight_MK, scale[:, None], bits), bits, scale)


def quantized_linear(weight_MK: NDArray[Any], linear: LinearScheme, rotated: bool, input_absmax: float) -> Any:
    """What a linear layer is in a scheme; its weight is rotated if `rotated`."""
    if rotated:
        weight_MK = Hadamard.of_width(weight_MK.shape[1]).apply(weight_MK)
    if linear.weight_bits == 16:
        return weight_MK
    scale = arithmetic.tensor_scale(input_absmax, bits=linear.activation_bits) if linear.static else None
    weight = quantized_weight(weight_MK, linear.weight_bits, linear.weight_granularity)
    return QuantizedLinear(weight, linear.activation_bits, scale, rotated)


def input_absmax(name: str) -> float:
    """Some bound of a layer's input, one for all that read the same tensor."""
    site = next((site for site, module in LINEAR_SITES.items() if name.endswith(module)), "head")
    group = next((i for i, sites in enumerate(SHARED_INPUTS) if site in sites), 0)
    return 1.5 + 0.3 * group + (0.1 * int(name.split(".")[2]) if site != "head" else 0)


def write_4bit(
    root: Path,
    seed: int = 0,
    write_tokenizer: TokenizerWriter = write_word_tokenizer,
    scheme: Scheme = named("w4a4"),  # noqa: B008 - immutable
    **overrides: Any,
) -> Path:
    """A quantized checkpoint with random weights, rounded by absmax; `overrides` go into config.json."""
    root.mkdir(parents=True, exist_ok=True)
    config_json = {**BASE, **overrides}
    config = LlamaConfig.from_json(root, config_json)
    weights = random_weights(config, seed)
    tensors: dict[str, NDArray[Any]] = {}
    for name in config.linear_shapes() | config.table_shapes():
        weight_MK = weights.pop(f"{name}.weight")
        if name == EMBEDDING:
            bits = scheme.embedding_bits
            value = weight_MK if bits == 16 else quantized_weight(weight_MK, bits, "channel")
        else:
            rotated = name.endswith("down_proj") and scheme.hadamard != "none"
            value = quantized_linear(weight_MK, scheme.linear(name), rotated, input_absmax(name))
        tensors |= stored_tensors(name, value)
    for name, weight_D in weights.items():
        tensors |= stored_tensors(name.removesuffix(".weight"), weight_D)
    write_tokenizer(root, config.vocab_size)
    provenance = {
        "tokenizer_sha256": sha256(root / "tokenizer.json"),
        "quality": {"perplexity_16bit": 10.0, "perplexity": 10.5},
    }
    write_quantized(root, config_json, scheme, tensors, provenance)
    return root


SERVED_CONTEXT = 128


SERVED_SHAPE = {
    "vocab_size": 320,
    "max_position_embeddings": SERVED_CONTEXT,
    "num_hidden_layers": 1,
    "eos_token_id": 0,
}


def write_served(root: Path) -> Path:
    """The W4A4 checkpoint that server tests serve: byte-level tokens, an end token, a context of `SERVED_CONTEXT`."""
    return write_4bit(root, write_tokenizer=write_byte_level_tokenizer, **SERVED_SHAPE)


def refusal(path: Path) -> str:
    """With what words `read_checkpoint` refuses a directory."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)
