"""The shape of a Llama model: config.json as a checked dataclass, and every parameter's name and shape."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from quant.arithmetic import MAX_REDUCTION
from quant.scheme import LINEAR_SITES, Scheme, SchemeError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""The module names of the two tables."""

LARGEST_SIZE, MOST_LAYERS = 2**31 - 1, 2**14
"""A config.json may state any number; beyond these, it is not the size of a model but a way to exhaust memory."""


class CheckpointError(ValueError):
    """A directory that is not a usable checkpoint; the message names the directory, the fault and the mend."""

    def __init__(self, root: Path, problem: str) -> None:
        super().__init__(f"{root}: {problem}")


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a Llama model, in Hugging Face's words. Sizes are counts of elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @classmethod
    def from_json(cls, root: Path, config: Mapping[str, Any]) -> LlamaConfig:
        """Reads config.json as transformers 4 and 5 write it.

        Raises:
            CheckpointError: another architecture, a feature that the engines do not compute (biases, rope
                scaling, another activation), or sizes that do not fit together.
        """

        def refuse(problem: str) -> CheckpointError:
            return CheckpointError(root, f"config.json: {problem}")

        if config.get("model_type") != "llama":
            raise refuse(f"model_type is {shortened(config.get('model_type'))}; only 'llama' is supported")
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise refuse(f"{key} is set; linear layers with a bias are not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise refuse(f"hidden_act is {shortened(config['hidden_act'])}; only 'silu' is supported")
        # transformers 5 writes rope_parameters, transformers 4 wrote rope_theta and rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise refuse(f"rope_parameters must be an object, is {shortened(rope)}")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise refuse(f"rope scaling of type {shortened(rope_type)} is not supported")

        def size(key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
            value = config.get(key) if config.get(key) is not None else default
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise refuse(f"{key} must be a positive whole number, is {shortened(value)}")
            if value > most:
                raise refuse(f"{key} must be at most {most}, is {shortened(value)}")
            return value

        def number(key: str, value: Any) -> float:
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
                raise refuse(f"{key} must be a positive number, is {shortened(value)}")
            return float(value)

        heads, width = size("num_attention_heads"), size("hidden_size")
        shape = cls(
            vocab_size=size("vocab_size"),
            hidden_size=width,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", width // heads),
            max_position_embeddings=size("max_position_embeddings"),
            rms_norm_eps=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope_theta=number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
        if heads % shape.num_key_value_heads:
            raise refuse(f"{heads} attention heads cannot share {shape.num_key_value_heads} key/value heads evenly")
        if shape.head_dim % 2:
            raise refuse(f"head_dim must be even for rotary embeddings, is {shape.head_dim}")
        return shape

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (M, K) of every linear layer of the body, in the order in which a step runs them."""
        width, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        sizes = (
            (queries, width),
            (keys, width),
            (keys, width),
            (width, queries),
            (inner, width),
            (inner, width),
            (width, inner),
        )
        return {
            f"model.layers.{layer}.{linear}": size
            for layer in range(self.num_hidden_layers)
            for linear, size in zip(LINEAR_SITES.values(), sizes, strict=True)
        }

    def table_shapes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (V, D) of the embedding and, unless it is tied to it, the head."""
        modules = (EMBEDDING,) if self.tie_word_embeddings else (EMBEDDING, HEAD)
        return dict.fromkeys(modules, (self.vocab_size, self.hidden_size))

    def norm_names(self) -> list[str]:
        """Full names of the norm weights, each of shape (D,), in the order in which a step runs them."""
        layers = [
            f"model.layers.{layer}.{norm}.weight"
            for layer in range(self.num_hidden_layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        return [*layers, "model.norm.weight"]

    def check_scheme(self, scheme: Scheme) -> None:
        """Raises `SchemeError` where `scheme` makes no sense for a model of this shape; the message says why."""
        self._check_reductions(scheme)
        if scheme.hadamard != "none" and self.intermediate_size % 2:
            raise SchemeError(
                f"hadamard {scheme.hadamard!r}: the feed-forward width {self.intermediate_size} is odd, and no "
                "Hadamard transform mixes an odd number of channels evenly; use 'none'"
            )
        if scheme.hadamard == "full" and self.hidden_size % 2:
            raise SchemeError(f"hadamard 'full': the model's width {self.hidden_size} is odd; use 'ffn' or 'none'")
        if self.tie_word_embeddings and scheme.hadamard == "full":
            return  # which unties the head
        if self.tie_word_embeddings and scheme.head.weight_bits != scheme.embedding_bits:
            raise SchemeError(
                f"embedding_bits {scheme.embedding_bits} beside a head of {scheme.head.weight_bits} bits: this model's "
                "head is tied to its embedding, so that both are one table; give both the same bits"
            )
        if self.tie_word_embeddings and scheme.head.weight_bits < 16:
            if scheme.head.weight_granularity != "channel":
                raise SchemeError(
                    "head: tied to the embedding, which has a scale a row; use weight_granularity channel"
                )
            if scheme.head.static:
                raise SchemeError("head: a tied head has no static input scale; use activation_granularity token")

    def _check_reductions(self, scheme: Scheme) -> None:
        """Every integer sum must fit into an int32."""
        widths = dict.fromkeys((*LINEAR_SITES, "head"), self.hidden_size)
        widths |= {"o": self.num_attention_heads * self.head_dim, "down": self.intermediate_size}
        for site, width in widths.items():
            if getattr(scheme, site).activation_bits < 16 and width > MAX_REDUCTION:
                raise SchemeError(
                    f"{site}: an integer sum over {width} inputs may overflow an int32, which holds one of "
                    f"{MAX_REDUCTION}; leave the site's activations at 16 bits (activation_bits: 16)"
                )

    def describe(self) -> str:
        """One phrase for error messages."""
        heads = "a tied head" if self.tie_word_embeddings else "its own head"
        return f"a Llama of {self.num_hidden_layers} layers, width {self.hidden_size} and {heads}"
