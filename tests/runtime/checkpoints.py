"""Writes tiny checkpoints with random weights, for the tests of whatever runs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from quant import arithmetic
from quant.format import QuantizedLinear, write_json, write_quantized
from quant.llama import LlamaConfig
from quant.scheme import named

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


def write_tokenizer(root: Path, vocab_size: int) -> None:
    """One word a token: "t0 t1 …", so that texts of known ids are easy to write."""
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "tokenizer.json"))


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Every parameter by full name, float32, of such a size that logits are of order one and attention is not flat."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, (rows, columns) in config.linear_shapes().items():
        weights[f"{name}.weight"] = rng.normal(0, 1.5 / np.sqrt(columns), (rows, columns)).astype(np.float32)
    for name, shape in config.float_shapes().items():
        one = name.endswith("norm.weight")
        weights[name] = (rng.uniform(0.5, 1.5, shape) if one else rng.normal(0, 0.3, shape)).astype(np.float32)
    return weights


def write_full_precision(root: Path, dtype: Any = np.float32, seed: int = 0, **overrides: Any) -> Path:
    """A full-precision checkpoint with random weights; `overrides` go into config.json."""
    root.mkdir(parents=True, exist_ok=True)
    config_json = {**BASE, **overrides}
    config = LlamaConfig.from_json(root, config_json)
    weights = {name: weight.astype(dtype) for name, weight in random_weights(config, seed).items()}
    save_file(weights, root / "model.safetensors", metadata={"format": "pt"})
    write_json(root / "config.json", {**config_json, "dtype": str(np.dtype(dtype))})
    write_tokenizer(root, config.vocab_size)
    return root


def write_4bit(root: Path, seed: int = 0, **overrides: Any) -> Path:
    """A W4A4 checkpoint with random weights, quantized by absmax."""
    root.mkdir(parents=True, exist_ok=True)
    config_json = {**BASE, **overrides}
    config = LlamaConfig.from_json(root, config_json)
    weights = random_weights(config, seed)
    linears = {}
    for i, (name, (_, columns)) in enumerate(config.linear_shapes().items()):
        weight_MK = weights.pop(f"{name}.weight")
        scale = arithmetic.weight_scale(float(np.abs(weight_MK).max()))
        packed = arithmetic.pack(arithmetic.quantize(weight_MK, scale))
        linears[name] = QuantizedLinear(packed, columns, scale, arithmetic.activation_scale(1.5 + 0.1 * i))
    write_tokenizer(root, config.vocab_size)
    write_quantized(root, config_json, named("w4a4"), linears, weights, provenance={"quality": {"note": "random"}})
    return root
