"""A checkpoint as an ONNX graph: one step of a Llama with its KV cache, for ONNX Runtime. No torch.

Inputs, of B sequences that each add L tokens:

    input_ids        int64   [B, L]
    positions        int64   [B, L]
    last_position    int32   [B]           of the last token of each sequence
    positions_seen   int32   []            most positions, old and new, of a sequence
    logit_rows       int64   [R]           which of the B * L tokens logits are wanted of
    past.i.key       float32 [B, G, P, C]  of layer i, with room for P positions; past.i.value likewise;
                                           float16 for CUDA

Outputs: `logits`, float32 [R, V]; `present.i.key` and `.value`, which ONNX Runtime writes in place where they are bound
to the memory of `past`. With L > 1, B is 1 (a limit of `GroupQueryAttention`).

What the scheme quantizes has the codes of `quant.arithmetic`. Keys and values are rounded to the bits of the scheme
as they are made, and held in float32. Norms, attention, rotary embedding and SiLU are ONNX Runtime's own, in float32.
For CUDA, attention is in float16 between casts: there is no kernel of it in float32.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from quant import arithmetic
from quant.format import CheckpointReader, QuantizedWeight
from quant.llama import EMBEDDING, HEAD, LlamaConfig
from quant.onnx_directory import CACHE_TYPES
from quant.onnx_graph import CONTRIB, GraphBuilder, np_kind
from quant.onnx_linear import (
    Linear,
    add_head_hadamard,
    add_joined,
    add_linear,
    add_linears,
    is_narrow,
)
from quant.scheme import LINEAR_SITES

FEW_ROWS = 4
"""For more rows than these, `MatMulInteger` is faster than `MatMulNBits` (docs/onnx.md)."""


def build_graph(reader: CheckpointReader, device: str) -> GraphBuilder:
    """The graph of a checkpoint of any scheme, or in full precision.

    Args:
        device: what it is for, one of `CACHE_TYPES`.

    Raises:
        CheckpointError: a value in it is not finite, or is none that a quantizer writes.
    """
    return _LlamaGraph(reader, device).graph


class _LlamaGraph:
    """Builds the graph. Shapes: see the module; D is the model's width, H query heads, G key/value heads."""

    def __init__(self, reader: CheckpointReader, device: str) -> None:
        self.graph = GraphBuilder(device)
        self._reader, self._config, self._cache_type = reader, reader.config, CACHE_TYPES[device]
        self._kv_bits = reader.scheme.kv_bits if reader.scheme else 16
        declare_inputs(self.graph, self._config, self._cache_type)
        self._add_rotary_tables()
        for name in self._present_names(""):
            self.graph.output(name, self._cache_type, _cache_shape(self._config))
        self._logits(self._layers(self._embedded()))

    def _add_rotary_tables(self) -> None:
        config = self._config
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        frequencies = (config.rope_theta**-exponents).astype(np.float32)
        positions = np.arange(config.max_position_embeddings).astype(np.float32)
        angles = (positions[:, None] * frequencies).astype(np.float64)
        self._cos = self.graph.weight("rotary.cos", np.cos(angles).astype(np.float32))
        self._sin = self.graph.weight("rotary.sin", np.sin(angles).astype(np.float32))

    def _embedded(self) -> str:
        table, graph = self._reader.embedding(), self.graph
        if not isinstance(table, QuantizedWeight):
            stored = graph.weight(EMBEDDING, np.asarray(table, np.float32))
            return graph.node("Gather", stored, "input_ids")
        codes = graph.node("Gather", graph.weight(EMBEDDING, table.codes), "input_ids")
        scales = graph.node("Gather", graph.weight(f"{EMBEDDING}.scale", table.scale[:, None]), "input_ids")
        return graph.node("Mul", graph.node("Cast", codes, to=np_kind(np.float32)), scales)

    def _layers(self, x: str) -> str:
        """The residual stream after all layers. They are there twice, for few rows and for many, where the products
        that are fastest differ; a step runs one of both."""
        if not self._products_differ():
            return self._body(x)[0]
        graph = self.graph
        few = graph.node("LessOrEqual", graph.node("Size", "input_ids"), graph.constant(FEW_ROWS, np.int64))
        outputs = {"residual": np.float32} | dict.fromkeys(self._present_names(""), self._cache_type)
        return graph.either(few, lambda: self._body(x, "few."), lambda: self._body(x, "many.", True), outputs)[0]

    def _products_differ(self) -> bool:
        scheme = self._reader.scheme
        if scheme is None or self.graph.device != "cpu":
            return False
        linears = [(scheme.linear(name), columns) for name, (_, columns) in self._config.linear_shapes().items()]
        return any(is_narrow(x.weight_bits, x.activation_bits, x.static, columns) for x, columns in linears)

    def _body(self, x: str, prefix: str = "", many_rows: bool = False) -> list[str]:
        """All layers, and the names of what they compute: the residual stream, keys and values."""
        self._prefix, self.graph.many_rows = prefix, many_rows
        # What is to be added to the residual stream is added by the norm that follows.
        addend = None
        for layer in range(self._config.num_hidden_layers):
            x, addend = self._block(layer, x, addend)
        self.graph.many_rows = False
        return [x if addend is None else self.graph.node("Add", x, addend), *self._present_names(prefix)]

    def _present_names(self, prefix: str) -> list[str]:
        layers = range(self._config.num_hidden_layers)
        return [f"{prefix}present.{layer}.{kind}" for layer in layers for kind in ("key", "value")]

    def _block(self, layer: int, x: str, addend: str | None) -> tuple[str, str]:
        """The residual stream, and what is to be added to it."""
        graph, prefix = self.graph, f"model.layers.{layer}"
        normed, x = self._added_norm(x, addend, f"{prefix}.input_layernorm.weight")
        qkv = add_joined(graph, normed, self._linears(prefix, "q", "k", "v"))
        (output,) = add_linears(graph, self._attention(layer, qkv), self._linears(prefix, "o"))
        normed, x = self._added_norm(x, output, f"{prefix}.post_attention_layernorm.weight")
        gate, up = add_linears(graph, normed, self._linears(prefix, "gate", "up"))
        active = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
        (output,) = add_linears(graph, active, self._linears(prefix, "down"))
        return x, output

    def _linears(self, prefix: str, *sites: str) -> dict[str, Linear]:
        names = [f"{prefix}.{LINEAR_SITES[site]}" for site in sites]
        return {name: self._reader.linear(name) for name in names}

    def _norm_weight(self, name: str) -> str:
        return self.graph.shared_weight(name, lambda: np.asarray(self._reader.norm(name), np.float32))

    def _norm(self, x: str, name: str) -> tuple[str, str]:
        """RMSNorm, and the mean of the squares, [.., 1]."""
        graph = self.graph
        mean = graph.node("ReduceMean", graph.node("Mul", x, x), graph.shape(-1))
        rms = graph.node("Sqrt", graph.node("Add", mean, graph.constant(self._config.rms_norm_eps)))
        return graph.node("Mul", graph.node("Div", x, rms), self._norm_weight(name)), mean

    def _added_norm(self, x: str, addend: str | None, name: str) -> tuple[str, str]:
        """RMSNorm of the residual stream and what is added to it, and their sum."""
        if addend is None:
            return self._norm(x, name)[0], x
        normed, _, _, x = self.graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, addend, self._norm_weight(name)],
            4,
            domain=CONTRIB,
            epsilon=self._config.rms_norm_eps,
        )
        return normed, x

    def _attention(self, layer: int, qkv: str) -> str:
        graph, config = self.graph, self._config
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        turned, v = graph.nodes("Split", [qkv, graph.shape((heads + kv_heads) * width, kv_heads * width)], 2, axis=-1)
        inputs = turned, "positions", self._cos, self._sin
        turned = graph.node("RotaryEmbedding", *inputs, domain=CONTRIB, num_heads=heads + kv_heads)
        packed = graph.node("Concat", turned, v, axis=-1) if self._kv_bits == 16 else self._with_rounded(turned, v)
        if self._cache_type != np.float32:
            packed = graph.node("Cast", packed, to=np_kind(self._cache_type))
        present = f"{self._prefix}present.{layer}"
        outputs = [f"{self._prefix}attended.{layer}", f"{present}.key", f"{present}.value"]
        past = f"past.{layer}.key", f"past.{layer}.value"
        attended, _, _ = graph.nodes(
            "GroupQueryAttention",
            [packed, "", "", *past, "last_position", "positions_seen"],
            outputs,
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=1 / math.sqrt(width),
        )
        if self._cache_type != np.float32:
            attended = graph.node("Cast", attended, to=np_kind(np.float32))
        return attended

    def _with_rounded(self, turned: str, v: str) -> str:
        """Queries, rounded keys and rounded values, side by side; `turned` has queries and keys."""
        graph, config = self.graph, self._config
        by_head = graph.shape(0, 0, -1, config.head_dim)
        turned, v = graph.node("Reshape", turned, by_head), graph.node("Reshape", v, by_head)
        if self._kv_bits == 4:
            turned = add_head_hadamard(graph, turned, config.head_dim)
        sizes = graph.shape(config.num_attention_heads, config.num_key_value_heads)
        q, k = graph.nodes("Split", [turned, sizes], 2, axis=2)
        rounded = self._rounded(graph.node("Concat", k, v, axis=2))
        return graph.node("Reshape", graph.node("Concat", q, rounded, axis=2), graph.shape(0, 0, -1))

    def _rounded(self, x: str) -> str:
        """Keys or values of any heads, [B, L, heads, C], as `arithmetic.quantize_kv` and `dequantize_kv` leave them.

        Its codes less their zero point: all stay in float32, and a head of zeros needs no scale of its own.
        """
        graph = self.graph
        levels = graph.constant(2**self._kv_bits - 1)
        zero, tiny, largest = (graph.constant(x) for x in (0, arithmetic.BFLOAT16_TINY, arithmetic.BFLOAT16_MAX))
        lowest = graph.node("Min", graph.node("ReduceMin", x, graph.shape(-1)), zero)
        highest = graph.node("Max", graph.node("ReduceMax", x, graph.shape(-1)), zero)
        width = graph.node("Sub", graph.node("Div", highest, levels), graph.node("Div", lowest, levels))
        width = graph.node("Cast", graph.node("Cast", width, to=int(TensorProto.BFLOAT16)), to=np_kind(np.float32))
        scale = graph.node("Clip", width, tiny, largest)
        least = graph.node("Round", graph.node("Div", lowest, scale))
        codes = graph.node("Round", graph.node("Div", x, scale))
        if self._kv_bits == 8:  # a scale may be too small by 1/256: with 8 bits the lowest code may be one too low
            least = graph.node("Max", least, graph.constant(-255))
            codes = graph.node("Max", codes, least)
        codes = graph.node("Min", codes, graph.node("Add", least, levels))
        return graph.node("Mul", codes, scale)

    def _logits(self, x: str) -> None:
        graph, width = self.graph, self._config.hidden_size
        rows = graph.node("Gather", graph.node("Reshape", x, graph.shape(-1, width)), "logit_rows")
        normed, mean = self._norm(graph.node("Reshape", rows, graph.shape(1, -1, width)), "model.norm.weight")
        logits = add_linear(graph, normed, HEAD, self._reader.head())
        # Codes know no NaN. A residual stream that has become infinite or NaN shows in the logits nevertheless.
        lost = graph.node("Mul", mean, graph.constant(0))
        logits = graph.node("Add", logits, lost)
        vocabulary = graph.shape(-1, self._config.vocab_size)
        graph.nodes("Reshape", [logits, vocabulary], ["logits"])
        graph.output("logits", np.float32, ["R", self._config.vocab_size])


def declare_inputs(graph: GraphBuilder, config: LlamaConfig, cache_type: type[np.generic]) -> None:
    """The inputs that the module names."""
    graph.input("input_ids", np.int64, ["B", "L"])
    graph.input("positions", np.int64, ["B", "L"])
    graph.input("last_position", np.int32, ["B"])
    graph.input("positions_seen", np.int32, [])
    graph.input("logit_rows", np.int64, ["R"])
    for layer in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            graph.input(f"past.{layer}.{kind}", cache_type, _cache_shape(config))


def _cache_shape(config: LlamaConfig) -> list[int | str]:
    return ["B", config.num_key_value_heads, "P", config.head_dim]
