"""A model of random weights, made in memory: its speed is that of any model of its shape and precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.llama import LlamaConfig
from quant.scheme import LINEAR_SITES, Scheme
from runtime.engine.native import hadamard_settings, model_shape
from runtime.engine.native_library import load_library
from runtime.engine.rotary import rotary_frequencies

INPUT_SCALE = 0.5
"""The static scale of inputs: random activations of a few units use most codes."""


def random_model(
    config: LlamaConfig, scheme: Scheme | None, *, num_blocks: int, max_rows: int, threads: int = 0, kernel: str = ""
) -> Any:
    """A `runtime.native._osp.Model` whose weights are random in every bit.

    Args:
        scheme: None for bfloat16.
        num_blocks: KV blocks of 16 positions.
        max_rows: most tokens of a step.
        threads: 0 for as many as the process may use.
        kernel: empty for the best.

    Raises:
        NativeLibraryError: the extension is not built.
        MemoryError: there is not memory enough.
    """
    model = load_library().Model(
        **model_shape(config),
        kv_bits=scheme.kv_bits if scheme else 16,
        kv_blocks=num_blocks,
        max_positions=num_blocks * 16,
        max_rows=max_rows,
        threads=threads,
        kernel=kernel,
    )
    sizes = config.linear_shapes()
    ones = np.ones(config.hidden_size, np.float32)
    for layer in range(config.num_hidden_layers):
        for site, module in LINEAR_SITES.items():
            rows, columns = sizes[f"model.layers.{layer}.{module}"]
            _set_linear(model, layer, site, rows, columns, scheme)
        model.set_norms(layer, ones, ones)
    _set_linear(model, 0, "head", config.vocab_size, config.hidden_size, scheme)
    bits = scheme.embedding_bits if scheme else 16
    model.set_embedding(**_weights(bits, config.vocab_size, config.hidden_size, per_row=True), seed=1)
    model.set_final_norm(ones)
    model.set_rotary_frequencies(rotary_frequencies(config))
    if scheme and scheme.hadamard != "none":
        model.set_ffn_hadamard(**hadamard_settings(config.intermediate_size))
    if scheme and scheme.kv_bits == 4:
        model.set_head_hadamard(**hadamard_settings(config.head_dim))
    model.check_weights()
    return model


def _set_linear(model: Any, layer: int, site: str, rows: int, columns: int, scheme: Scheme | None) -> None:
    linear = getattr(scheme, site) if scheme else None
    settings: dict[str, Any] = {}
    if linear and linear.weight_bits < 16:
        scale = INPUT_SCALE if linear.static else None
        rotated = site == "down" and scheme is not None and scheme.hadamard != "none"
        settings = {"input_bits": linear.activation_bits, "input_scale": scale, "rotated": rotated}
    weights = _weights(
        linear.weight_bits if linear else 16,
        rows,
        columns,
        per_row=linear is not None and linear.weight_granularity == "channel",
    )
    seed = 1000 * layer + len(site) + ord(site[0])
    model.set_linear(layer=layer, site=site, rows=rows, columns=columns, seed=seed, **weights, **settings)


def _weights(bits: int, rows: int, columns: int, *, per_row: bool) -> dict[str, Any]:
    if bits == 16:
        return {"format": "bfloat16"}
    return {"format": f"int{bits}", "scales": random_scales(bits, rows if per_row else 1, columns)}


def random_scales(bits: int, count: int, columns: int) -> NDArray[np.float32]:
    """Scales, float32 [count], with which a matrix of random codes gives outputs about as large as its inputs.

    Random codes have a standard deviation of 2^bits / sqrt(12). The nearest power of two is a bfloat16 number.
    """
    return np.full(count, 2.0 ** round(np.log2(12**0.5 / 2**bits / columns**0.5)), np.float32)
