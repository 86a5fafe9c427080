"""The shapes that are measured with random weights: those of the trainer's presets, and of the bundled model."""

from __future__ import annotations

from quant.llama import LlamaConfig


def _shape(vocabulary: int, width: int, inner: int, layers: int, heads: int, context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
    )


SHAPES = {
    "demo": _shape(4096, 256, 640, 4, 4, 512),
    "135m": _shape(49_152, 576, 1536, 30, 9, 2048),
    "1.4b": _shape(49_152, 2048, 5504, 24, 16, 2048),
}
"""By name; "1.4b" is that of the OSP paper (arXiv 2506.19697)."""
