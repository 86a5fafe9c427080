"""Linear layers as ONNX nodes: the integer products of `quant.arithmetic`, exactly, with ONNX Runtime's operators.

ONNX Runtime has no product of 4-bit weights with given integers. Its `MatMulNBits` at accuracy level 4 finds a scale of
its own for each block of inputs, absmax / 127, and rounds them to int8: codes of 4 bits would be rounded again. So each
block has one input more, always 127, whose weight is zero: its absmax is 127, its scale is 1, and every code stays what
it is. The sums are then integers that float32 holds, exact in any order.

    codes of inputs        weights      operator                                    weights in memory
    4 bits, or 8 a token   4 bits       few rows: MatMulNBits, level 4, padded      4 bits, and what pads them
                                        many rows: MatMulInteger of uint8 and int8  8 bits
    4 or 8 bits            4 or 8 bits  MatMulInteger of uint8 and int8             8 bits
    8 bits                 8 bits       MatMulInteger of uint8 on both sides        8 bits
    not quantized          4 or 8 bits  MatMulNBits, level 1: products of floats    4 or 8 bits
    not quantized          16 or 32     MatMul of floats                            32 bits

One row waits for the weights to come from memory, so that it is fastest where they have 4 bits; for many rows the
kernels of MatMulInteger are faster. Without VNNI those of int8 weights saturate sums of two products in 16 bits: no sum
of codes comes near to that where one side has 4 bits, but 8 bits on both sides need weights in uint8.

CUDA knows no accuracy level: there the products of floats have codes as inputs, sums of which float32 holds. Others are
`MatMulInteger` of uint8 there too, for which ONNX Runtime goes to the CPU.

Level 4 and `QuantizeLinear` round half to even as the scheme does, so that no node has to before. Every node costs a
decoding step a microsecond or more, as much as a small product.

Shapes: a layer's input is [B, L, K], its output [B, L, M].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant import arithmetic
from quant.hadamard import Hadamard, base_matrix, sylvester
from quant.onnx_graph import CONTRIB, GraphBuilder, np_kind
from quant.tensors import Tensor
from quant.weights import QuantizedLinear, QuantizedWeight

Linear = Tensor | QuantizedLinear

BLOCK_SIZES = (256, 128, 64, 32)
"""Those of `MatMulNBits` that are tried."""

MOST_ON_CUDA = 128
"""The largest that it has kernels for."""

BLOCK_COST = 12
"""Reading the scale of a block and summing its inputs takes as long as so many bytes of codes."""

INTEGERS, FLOATS = 4, 1
"""Accuracy levels of `MatMulNBits`: inputs rounded to int8; inputs in float32."""

FULL_BLOCK = 127
"""The input that gives a block the scale 1."""

EXACT_SUM = 1 << 24
"""float32 holds all integers up to it."""


def add_linears(graph: GraphBuilder, x: str, layers: dict[str, Linear]) -> list[str]:
    """Layers that read one tensor `x`, by their names; gives the names of what each computes, [B, L, M]."""
    product = add_joined(graph, x, layers)
    if len(layers) == 1:
        return [product]
    sizes = graph.shape(*(_rows(layer) for layer in layers.values()))
    return graph.nodes("Split", [product, sizes], len(layers), axis=-1)


def add_joined(graph: GraphBuilder, x: str, layers: dict[str, Linear]) -> str:
    """Layers that read one tensor `x`; gives the name of what they compute side by side, [B, L, sum of M].

    They become one matrix where their codes and inputs have the same bits: one pass over the inputs, one product.
    """
    joined = _joined(list(layers.values()))
    if joined is not None:
        return add_linear(graph, x, "+".join(layers), joined)
    products = [add_linear(graph, x, name, layer) for name, layer in layers.items()]
    return graph.node("Concat", *products, axis=-1)


def add_linear(graph: GraphBuilder, x: str, name: str, layer: Linear) -> str:
    """One layer; gives the name of what it computes."""
    if not isinstance(layer, QuantizedLinear):
        return graph.node("MatMul", x, graph.shared_weight(name, lambda: np.asarray(layer, np.float32).T))
    if layer.rotated:
        x = add_hadamard(graph, x, layer.weight.columns)
    if layer.input_bits == 16:
        return graph.node("Mul", _float_product(graph, x, name, layer.weight), _weight_scale(graph, name, layer))
    scale = _token_scale(graph, x, layer.input_bits) if layer.input_scale is None else graph.constant(layer.input_scale)
    if graph.device == "cuda":
        sums = _product_on_cuda(graph, add_quantize(graph, x, scale, layer.input_bits), name, layer)
    elif _is_narrow(layer) and not graph.many_rows:
        sums = _narrow_product(graph, graph.node("Div", x, scale), name, layer)
    elif layer.input_scale is None:
        sums = _integer_product(graph, graph.node("Div", x, scale), name, layer)
    else:
        return _scaled_product(graph, x, name, layer)
    if layer.input_scale is not None:
        return graph.node("Mul", sums, _weight_scale(graph, name, layer))
    both = graph.node("Mul", scale, _weight_scale(graph, name, layer))
    # Scales are positive: the maximum changes nothing, but keeps ONNX Runtime from fusing what it sees, a product of
    # integers and two scales, into an operator of its own, which multiplies in another order.
    both = graph.node("Max", both, graph.constant(0))
    return graph.node("Mul", sums, both)


def add_quantize(graph: GraphBuilder, x: str, scale: str, bits: int) -> str:
    """`arithmetic.quantize`: codes, in float32."""
    rounded = graph.node("Round", graph.node("Div", x, scale))
    lowest, highest = (graph.constant(bound) for bound in arithmetic.code_range(bits))
    return graph.node("Clip", rounded, lowest, highest)


def add_hadamard(graph: GraphBuilder, x: str, width: int) -> str:
    """`Hadamard.of_width(width)` of [B, L, width].

    Two products with matrices of signs, whose sums have another order than those of `Hadamard.apply`.
    """
    transform = Hadamard.of_width(width)
    factor = 1 / np.sqrt(transform.base * transform.power)
    y = graph.node("Reshape", x, graph.shape(0, 0, transform.blocks * transform.base, transform.power))
    name = f"sylvester.{transform.power}.{transform.base}"
    y = graph.node("MatMul", y, graph.shared_weight(name, lambda: _floats(sylvester(transform.power) * factor)))
    if transform.base > 1:
        name = f"hadamard.{transform.base}"
        y = graph.node("MatMul", graph.shared_weight(name, lambda: _floats(base_matrix(transform.base))), y)
    return graph.node("Reshape", y, graph.shape(0, 0, width))


def add_head_hadamard(graph: GraphBuilder, x: str, width: int) -> str:
    """`Hadamard.of_width(width)` of the last axis of [B, L, heads, width], as one product."""
    matrix = graph.shared_weight(f"heads.{width}", lambda: _floats(Hadamard.of_width(width).matrix().T))
    return graph.node("MatMul", x, matrix)


def block_size(columns: int) -> int:
    """The block size whose product takes the least time, when one code of each block is given away."""
    return min(BLOCK_SIZES, key=lambda size: -(-columns // (size - 1)) * (size // 2 + BLOCK_COST))


def group_width(columns: int, size: int) -> int:
    """After so many inputs comes one that is always 127, and no block of `size` is without: the largest such number.

    One that divides the columns, so that nothing else is to be padded, if it needs no more blocks than `size - 1`.
    """
    blocks = -(-columns // (size - 1))
    dividing = (width for width in range(size - 1, 0, -1) if columns % width == 0)
    return next((width for width in dividing if columns // width * (width + 1) <= blocks * size), size - 1)


def pack_blocks(codes_MK: NDArray[np.int8], size: int, bits: int = 4) -> NDArray[np.uint8]:
    """Codes as `MatMulNBits` holds them, uint8 [M, blocks, size * bits / 8]: shifted by half their range."""
    rows, columns = codes_MK.shape
    stored = np.full((rows, -(-columns // size) * size), 1 << (bits - 1), np.uint8)
    stored[:, :columns] = _moved(codes_MK, bits)
    if bits == 4:
        stored = stored[:, 0::2] | (stored[:, 1::2] << np.uint8(4))
    return stored.reshape(rows, -1, size * bits // 8)


def is_narrow(weight_bits: int, input_bits: int, static: bool, columns: int) -> bool:
    """Whether level 4 holds the inputs' codes. With 8 bits a static scale's may be -128, a token's own may not."""
    symmetric = not static and 127 * 8 * columns <= EXACT_SUM
    return weight_bits == 4 and (input_bits == 4 or (input_bits == 8 and symmetric))


def _is_narrow(layer: QuantizedLinear) -> bool:
    return is_narrow(layer.weight.bits, layer.input_bits, layer.input_scale is not None, layer.weight.columns)


def _narrow_product(graph: GraphBuilder, x: str, name: str, layer: QuantizedLinear) -> str:
    """Exact sums of products of codes; `x` has still to be clipped and rounded."""
    rows, columns = layer.weight.shape
    size = block_size(columns)
    width = group_width(columns, size)
    groups = -(-columns // width)
    missing = groups * width - columns
    lowest, highest = arithmetic.code_range(layer.input_bits)
    # No code is beyond -127, but x / (absmax / 127) may be, by its last digit, and would change the block's scale.
    x = graph.node("Clip", x, graph.constant(max(lowest, -FULL_BLOCK)), graph.constant(highest))
    if missing:
        x = graph.node("Pad", x, graph.shape(0, 0, 0, 0, 0, missing))
    x = graph.node("Reshape", x, graph.shape(0, 0, groups, width))
    x = graph.node("Pad", x, graph.shape(0, 0, 0, 0, 0, 0, 0, 1), graph.constant(FULL_BLOCK))
    x = graph.node("Reshape", x, graph.shape(0, 0, groups * (width + 1)))
    codes_MGC = np.pad(layer.weight.codes, ((0, 0), (0, missing))).reshape(rows, groups, width)
    padded_MK = np.pad(codes_MGC, ((0, 0), (0, 0), (0, 1))).reshape(rows, groups * (width + 1))
    return _blocked_product(graph, x, name, padded_MK, 4, size, INTEGERS)


def _float_product(graph: GraphBuilder, x: str, name: str, weight: QuantizedWeight) -> str:
    """Sums of products of floats with codes."""
    size = MOST_ON_CUDA if graph.device == "cuda" else BLOCK_SIZES[0]
    return _blocked_product(graph, x, name, weight.codes, weight.bits, size, FLOATS)


def _blocked_product(
    graph: GraphBuilder, x: str, name: str, codes_MK: NDArray[np.int8], bits: int, size: int, accuracy: int
) -> str:
    rows, columns = codes_MK.shape
    packed = graph.shared_weight(name, lambda: pack_blocks(codes_MK, size, bits))
    scales = np.ones((rows, -(-columns // size)), np.float32)
    inputs = x, packed, graph.shared_weight(f"{name}.block_scales", lambda: scales)
    settings = {"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": accuracy}
    return graph.node("MatMulNBits", *inputs, domain=CONTRIB, **settings)


def _integer_product(graph: GraphBuilder, x: str, name: str, layer: QuantizedLinear) -> str:
    """Exact sums of products of codes; `x` was divided by its scale, and has still to be clipped and rounded."""
    operands, zeros = _integer_operands(graph, x, name, layer)
    return graph.node("Cast", graph.node("MatMulInteger", *operands, *zeros), to=np_kind(np.float32))


def _scaled_product(graph: GraphBuilder, x: str, name: str, layer: QuantizedLinear) -> str:
    """Exact sums of products of codes, times both scales; that of `x` is static, and `x` as it comes."""
    operands, zeros = _integer_operands(graph, x, name, layer)
    scales = graph.constant(1), _weight_scale(graph, name, layer)
    return graph.node("MatMulIntegerToFloat", *operands, *scales, *zeros, domain=CONTRIB)


def _integer_operands(
    graph: GraphBuilder, x: str, name: str, layer: QuantizedLinear
) -> tuple[tuple[str, str], list[str]]:
    """Codes of inputs and weights in 8 bits, and their zero points."""
    lowest, highest = arithmetic.code_range(layer.input_bits)
    scale = np.float32(1) if layer.input_scale is None else np.float32(layer.input_scale)
    if layer.input_bits < 8:  # codes of 8 bits end where uint8 does; these are multiples of a scale of 8 digits: exact
        x = graph.node("Clip", x, graph.constant(lowest * scale), graph.constant(highest * scale))
    zero = graph.constant(-lowest, np.uint8)
    codes = graph.node("QuantizeLinear", x, graph.constant(scale), zero)
    if min(layer.input_bits, layer.weight.bits) < 8:
        return (codes, graph.shared_weight(f"{name}.int8", lambda: layer.weight.codes.T)), [zero]
    stored = graph.shared_weight(f"{name}.uint8", lambda: _moved(layer.weight.codes, 8).T)
    return (codes, stored), [zero, graph.constant(128, np.uint8)]


def _product_on_cuda(graph: GraphBuilder, codes: str, name: str, layer: QuantizedLinear) -> str:
    """Exact sums of products of codes, which are still floats."""
    weight = layer.weight
    if weight.bits == 4 and 8 * 2 ** (layer.input_bits - 1) * weight.columns <= EXACT_SUM:
        return _float_product(graph, codes, name, weight)
    moved = graph.node("Cast", graph.node("Add", codes, graph.constant(128)), to=np_kind(np.uint8))
    zero = graph.constant(128, np.uint8)
    sums = graph.node("MatMulInteger", moved, graph.weight(name, _moved(weight.codes, 8).T), zero, zero)
    return graph.node("Cast", sums, to=np_kind(np.float32))


def _moved(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Codes as ONNX Runtime has them in uint8: plus half their range."""
    return codes.view(np.uint8) + np.uint8(1 << (bits - 1))  # the sum wraps, as it must


def _weight_scale(graph: GraphBuilder, name: str, layer: QuantizedLinear) -> str:
    """The scale of the weights, times that of the inputs where it is static."""
    scale = layer.weight.scale if layer.input_scale is None else layer.weight.scale * layer.input_scale
    return graph.shared_weight(f"{name}.scale", lambda: scale)


def _token_scale(graph: GraphBuilder, x: str, bits: int) -> str:
    """`arithmetic.token_scales`, [B, L, 1]."""
    absmax = graph.node("ReduceMax", graph.node("Abs", x), graph.shape(-1))
    scale = graph.node("Div", absmax, graph.constant(arithmetic.code_range(bits)[1]))
    scale = graph.node("Max", scale, graph.constant(arithmetic.BFLOAT16_TINY))
    return graph.node("Where", graph.node("Equal", absmax, graph.constant(0)), graph.constant(1), scale)


def _joined(layers: Sequence[Linear]) -> Linear | None:
    """The layers as one matrix, one below the other; None: they differ in what must be the same."""
    if len(layers) == 1:
        return layers[0]
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if not quantized:
        return np.concatenate([np.asarray(layer, np.float32) for layer in layers])
    kinds = {(layer.weight.bits, layer.input_bits, layer.input_scale, layer.rotated) for layer in quantized}
    if len(quantized) < len(layers) or len(kinds) > 1:
        return None
    weights = [layer.weight for layer in quantized]
    scale = np.concatenate([np.broadcast_to(weight.scale, weight.shape[:1]) for weight in weights])
    stored = np.concatenate([weight.stored for weight in weights])
    return replace(quantized[0], weight=replace(weights[0], stored=stored, scale=scale))


def _rows(layer: Linear) -> int:
    return layer.weight.shape[0] if isinstance(layer, QuantizedLinear) else layer.shape[0]


def _floats(matrix: NDArray[Any]) -> NDArray[np.float32]:
    return matrix.astype(np.float32)
