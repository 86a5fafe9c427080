"""Writes a W4A4 checkpoint of a few kilobytes with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from quant import arithmetic, scheme
from quant.format import QuantizedLinear, sha256, write_quantized
from quant.llama import LlamaConfig

END = "<|endoftext|>"
CONTEXT = 128
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE that puts `END` in front."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["Once upon a time there was a little cat. ", "The cat sat on the mat."], trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    backend.save(str(directory / "tokenizer.json"))


def write_checkpoint(directory: Path) -> Path:
    """A W4A4 checkpoint with random weights; `directory` is created."""
    directory.mkdir(parents=True)
    write_tokenizer(directory)
    random = np.random.default_rng(0)
    config = LlamaConfig.from_json(directory, CONFIG)
    linears = {}
    for name, (rows, columns) in config.linear_shapes().items():
        codes = random.integers(-8, 8, (rows, columns)).astype(np.int8)
        linears[name] = QuantizedLinear(arithmetic.pack(codes), columns, np.float32(0.125), np.float32(0.5))
    floats = {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in config.float_shapes().items()}
    provenance = {
        "tokenizer_sha256": sha256(directory / "tokenizer.json"),
        "quality": {"perplexity_16bit": 10.0, "perplexity_w4a4": 10.5},
    }
    write_quantized(directory, CONFIG, scheme.named("w4a4"), linears, floats, provenance)
    return directory
