"""Writes a checkpoint of random weights in the shape of a preset: to load and to serve, not to read.

python -m benchmarks.random_checkpoint build/random-1.4b --shape 1.4b
python -m benchmarks.random_checkpoint build/random-1.4b-bf16 --shape 1.4b --precision bfloat16
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quant.format import EMBEDDING, sha256, stored_tensors, write_json, write_quantized
from quant.llama import LlamaConfig
from quant.scheme import LinearScheme, Scheme, SchemeError
from quant.weights import QuantizedLinear, QuantizedWeight
from runtime.bench.precision import DEFAULT_PRECISION, scheme_of
from runtime.bench.random_model import INPUT_SCALE, random_scales
from runtime.bench.shapes import SHAPES


def write_random_checkpoint(root: Path, config: LlamaConfig, scheme: Scheme | None) -> None:
    """Writes it into `root`, which must not exist; every byte of a text is a token.

    Args:
        scheme: None for bfloat16.

    Raises:
        FileExistsError: it exists.
    """
    root.mkdir(parents=True)
    _byte_tokenizer(config.vocab_size).save(str(root / "tokenizer.json"))
    if scheme is None:
        _write_bfloat16(root, config)
    else:
        _write_quantized(root, config, scheme)


def _write_bfloat16(root: Path, config: LlamaConfig) -> None:
    rng = np.random.default_rng(0)
    shapes = config.linear_shapes() | config.table_shapes()
    tensors = {
        name + ".weight": _weight(rng, *shape, 16, per_row=False).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    tensors |= {name: np.ones(config.hidden_size, ml_dtypes.bfloat16) for name in config.norm_names()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    write_json(root / "config.json", {**_config_json(config), "dtype": "bfloat16"})


def _write_quantized(root: Path, config: LlamaConfig, scheme: Scheme) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for name, (rows, columns) in (config.linear_shapes() | config.table_shapes()).items():
        if name == EMBEDDING:
            tensors |= stored_tensors(name, _weight(rng, rows, columns, scheme.embedding_bits, per_row=True))
        else:
            tensors |= stored_tensors(name, _linear(rng, rows, columns, scheme.linear(name), name))
    for name in config.norm_names():
        tensors |= stored_tensors(name.removesuffix(".weight"), np.ones(config.hidden_size, np.float32))
    write_quantized(root, _config_json(config), scheme, tensors, {"tokenizer_sha256": sha256(root / "tokenizer.json")})


def _byte_tokenizer(vocab_size: int) -> Tokenizer:
    """The 256 bytes, and words that no text comes to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"w{i}" for i in range(vocab_size - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _config_json(config: LlamaConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _linear(rng: np.random.Generator, rows: int, columns: int, linear: LinearScheme, name: str) -> Any:
    weight = _weight(rng, rows, columns, linear.weight_bits, per_row=linear.weight_granularity == "channel")
    if not isinstance(weight, QuantizedWeight):
        return weight
    scale = np.float32(INPUT_SCALE) if linear.static else None
    return QuantizedLinear(weight, linear.activation_bits, scale, name.endswith("down_proj"))


def _weight(rng: np.random.Generator, rows: int, columns: int, bits: int, *, per_row: bool) -> Any:
    if bits == 16:
        return (rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)).astype(np.float32)
    scale = random_scales(bits, rows if per_row else 1, columns)
    stored = rng.integers(0, 256, (rows, columns * bits // 8), np.uint8)
    return QuantizedWeight(stored if bits == 4 else stored.view(np.int8), columns, bits, scale)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1.4b", show_default=True)
@click.option("--precision", default=DEFAULT_PRECISION, show_default=True)
def main(out: Path, shape: str, precision: str) -> None:
    """Write a checkpoint of random weights to OUT."""
    try:
        write_random_checkpoint(out, SHAPES[shape], scheme_of(precision))
    except FileExistsError:
        raise click.ClickException(f"{out} exists already") from None
    except SchemeError as error:
        raise click.BadParameter(str(error), param_hint="--precision") from None


if __name__ == "__main__":
    main()
