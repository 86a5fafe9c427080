"""A checkpoint as an ONNX graph: one step of a Llama with its KV cache, for ONNX Runtime. No torch.

Inputs, of B sequences that each add L tokens:

    input_ids        int64   [B, L]
    positions        int64   [B, L]
    last_position    int32   [B]           of the last token of each sequence
    positions_seen   int32   []            most positions, old and new, of a sequence
    logit_rows       int64   [R]           which of the B * L tokens logits are wanted of
    past.i.key       float32 [B, G, P, C]  of layer i, with room for P positions; past.i.value likewise

Outputs: `logits`, float32 [R, V]; `present.i.key` and `.value`, which ONNX Runtime writes in place where they are bound
to the memory of `past`. With L > 1, B is 1 (a limit of `GroupQueryAttention`).

What the scheme quantizes has the codes of `quant.arithmetic`. Keys and values are rounded to the bits of the scheme
as they are made, and held in float32. Norms, attention, rotary embedding and SiLU are ONNX Runtime's own, in float32.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from quant import arithmetic
from quant.format import CheckpointReader, QuantizedWeight
from quant.llama import EMBEDDING, HEAD, LlamaConfig
from quant.onnx_graph import CONTRIB, GraphBuilder, np_kind
from quant.onnx_linear import Linear, add_hadamard, add_linear, add_linears
from quant.scheme import LINEAR_SITES


def build_graph(reader: CheckpointReader) -> GraphBuilder:
    """The graph of a checkpoint of any scheme, or in full precision.

    Raises:
        CheckpointError: a value in it is not finite, or is none that a quantizer writes.
    """
    return _LlamaGraph(reader).graph


class _LlamaGraph:
    """Builds the graph. Shapes: see the module; D is the model's width, H query heads, G key/value heads."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.graph = GraphBuilder()
        self._reader, self._config = reader, reader.config
        self._kv_bits = reader.scheme.kv_bits if reader.scheme else 16
        declare_inputs(self.graph, self._config)
        self._add_rotary_tables()
        x = self._embedded()
        for layer in range(self._config.num_hidden_layers):
            x = self._block(layer, x)
        self._logits(x)

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

    def _block(self, layer: int, x: str) -> str:
        graph, prefix = self.graph, f"model.layers.{layer}"
        normed, _ = self._norm(x, f"{prefix}.input_layernorm.weight")
        attended = self._attention(layer, *add_linears(graph, normed, self._linears(prefix, "q", "k", "v")))
        (output,) = add_linears(graph, attended, self._linears(prefix, "o"))
        x = graph.node("Add", x, output)
        normed, _ = self._norm(x, f"{prefix}.post_attention_layernorm.weight")
        gate, up = add_linears(graph, normed, self._linears(prefix, "gate", "up"))
        active = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
        (output,) = add_linears(graph, active, self._linears(prefix, "down"))
        return graph.node("Add", x, output)

    def _linears(self, prefix: str, *sites: str) -> dict[str, Linear]:
        names = [f"{prefix}.{LINEAR_SITES[site]}" for site in sites]
        return {name: self._reader.linear(name) for name in names}

    def _norm(self, x: str, name: str) -> tuple[str, str]:
        """RMSNorm, and the mean of the squares, [.., 1]."""
        graph = self.graph
        mean = graph.node("ReduceMean", graph.node("Mul", x, x), graph.shape(-1))
        rms = graph.node("Sqrt", graph.node("Add", mean, graph.constant(self._config.rms_norm_eps)))
        weight = graph.weight(name, np.asarray(self._reader.norm(name), np.float32))
        return graph.node("Mul", graph.node("Div", x, rms), weight), mean

    def _attention(self, layer: int, q: str, k: str, v: str) -> str:
        graph, config = self.graph, self._config
        q, k = self._rotated(q, config.num_attention_heads), self._rotated(k, config.num_key_value_heads)
        if self._kv_bits < 16:
            k, v = self._rounded(k, v)
        outputs = [f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"]
        past = f"past.{layer}.key", f"past.{layer}.value"
        attended, *present = graph.nodes(
            "GroupQueryAttention",
            [q, k, v, *past, "last_position", "positions_seen"],
            outputs,
            domain=CONTRIB,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=1 / math.sqrt(config.head_dim),
        )
        for name in present:
            graph.output(name, np.float32, _cache_shape(config))
        return attended

    def _rotated(self, x: str, heads: int) -> str:
        """Queries or keys as attention and cache take them: turned to their positions and, for 4 bits, transformed."""
        inputs = x, "positions", self._cos, self._sin
        x = self.graph.node("RotaryEmbedding", *inputs, domain=CONTRIB, num_heads=heads)
        return add_hadamard(self.graph, x, self._config.head_dim) if self._kv_bits == 4 else x

    def _rounded(self, k: str, v: str) -> tuple[str, str]:
        """Keys and values as `arithmetic.quantize_kv` and `dequantize_kv` leave them, float32 [B, L, G * C] each."""
        graph, config = self.graph, self._config
        levels = graph.constant(2**self._kv_bits - 1)
        zero, tiny, largest = (graph.constant(x) for x in (0, arithmetic.BFLOAT16_TINY, arithmetic.BFLOAT16_MAX))
        both = graph.node("Concat", k, v, axis=-1)
        x = graph.node("Reshape", both, graph.shape(0, 0, 2 * config.num_key_value_heads, config.head_dim))
        lowest = graph.node("Min", graph.node("ReduceMin", x, graph.shape(-1)), zero)
        highest = graph.node("Max", graph.node("ReduceMax", x, graph.shape(-1)), zero)
        width = graph.node("Sub", graph.node("Div", highest, levels), graph.node("Div", lowest, levels))
        width = graph.node("Cast", graph.node("Cast", width, to=int(TensorProto.BFLOAT16)), to=np_kind(np.float32))
        scale = graph.node("Clip", width, tiny, largest)
        empty = graph.node("Equal", graph.node("Sub", highest, lowest), zero)
        scale = graph.node("Where", empty, graph.constant(1), scale)
        point = graph.node(
            "Clip", graph.node("Round", graph.node("Div", graph.node("Neg", lowest), scale)), zero, levels
        )
        moved = graph.node("Add", graph.node("Round", graph.node("Div", x, scale)), point)
        codes = graph.node("Clip", moved, zero, levels)
        rounded = graph.node("Mul", graph.node("Sub", codes, point), scale)
        rounded = graph.node("Reshape", rounded, graph.shape(0, 0, -1))
        first, second = graph.nodes("Split", [rounded], 2, axis=-1, num_outputs=2)
        return first, second

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


def declare_inputs(graph: GraphBuilder, config: LlamaConfig) -> None:
    """The inputs that the module names."""
    graph.input("input_ids", np.int64, ["B", "L"])
    graph.input("positions", np.int64, ["B", "L"])
    graph.input("last_position", np.int32, ["B"])
    graph.input("positions_seen", np.int32, [])
    graph.input("logit_rows", np.int64, ["R"])
    for layer in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            graph.input(f"past.{layer}.{kind}", np.float32, _cache_shape(config))


def _cache_shape(config: LlamaConfig) -> list[int | str]:
    return ["B", config.num_key_value_heads, "P", config.head_dim]
