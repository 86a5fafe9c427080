"""Schemes that between them have every kind of layer, table and cache that an engine must run."""

from __future__ import annotations

from typing import Any

from checkpoints import ODD_WIDTHS

from quant.scheme import Scheme, named

SCHEMES: dict[str, Scheme] = {
    "w4a4": named("w4a4"),
    "all at 4 bits": named("w4a4-token").changed(kv_bits=4, head=4, embedding_bits=4, hadamard="ffn"),
    "w4a8 kv8 head8": named("w4a8").changed(kv_bits=8, head=8, embedding_bits=8),
    "w4a16 kv4": named("w4a16").changed(kv_bits=4),
    "mixed sites": named("w4a4").changed(
        q={"weight_bits": 16, "activation_bits": 16},
        o={"weight_bits": 8, "activation_bits": 8, "activation_granularity": "token"},
        gate={"weight_granularity": "channel"},
        down={"weight_bits": 8, "activation_bits": 16},
        head={"weight_granularity": "tensor", "activation_granularity": "tensor"},
        kv_bits=8,
        hadamard="ffn",
    ),
}

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    # Even where the scheme rotates it, and of no order that a Hadamard matrix is known for: the transform has blocks.
    "odd widths": {**ODD_WIDTHS, "intermediate_size": 54},
}

CASES = [(scheme, shape) for scheme in SCHEMES for shape in SHAPES if (scheme, shape) != ("mixed sites", "tied")]
"""Names of a scheme and of a shape that go together: a tied head has the embedding's bits, and no static scale."""
