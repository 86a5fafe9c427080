"""The ONNX export: each kind of linear layer against the specification, in ONNX Runtime, and the command.

`OSP_TEST_ONNX_PROVIDER=cuda` computes on a GPU, where onnxruntime-gpu is installed.
"""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
from checkpoints import ODD_WIDTHS, write_4bit, write_full_precision
from click.testing import CliRunner

from quant import arithmetic
from quant.export_cli import export
from quant.hadamard import Hadamard
from quant.scheme import named
from quant.weights import QuantizedLinear, QuantizedWeight

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from quant.onnx_graph import GraphBuilder  # noqa: E402
from quant.onnx_linear import (  # noqa: E402
    add_hadamard,
    add_head_hadamard,
    add_linear,
    add_linears,
    block_size,
    group_width,
    pack_blocks,
)
from runtime.engine.onnx_provider import open_session, placement  # noqa: E402

PROVIDER = os.environ.get("OSP_TEST_ONNX_PROVIDER", "cpu")

WIDTHS = (1, 31, 39, 255, 256, 640)
"""Reductions: less than a block, no multiple of anything, a block without and with the place that is given away."""


def run(tmp_path, build, x_BLK, device=PROVIDER):
    """What ONNX Runtime makes of the graph that `build` adds to the input `x`."""
    graph = GraphBuilder(device)
    graph.input("x", np.float32, ["B", "L", x_BLK.shape[-1]])
    for name in build(graph):
        graph.output(name, np.float32, ["B", "L", "M"])
    graph.write(tmp_path, {})
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = open_session(tmp_path / "model.onnx", PROVIDER, options)
    assert placement(session).misplaced(PROVIDER).keys() <= {"MatMulInteger", "LessOrEqual"}  # CUDA has none of these
    return session.run(None, {"x": x_BLK})


def layer(rng, columns, input_bits, weight_bits, static, granularity="tensor", rows=45):
    """A layer whose first rows of codes are the lowest and the highest."""
    lowest, highest = arithmetic.code_range(weight_bits)
    codes_MK = rng.integers(lowest, highest + 1, (rows, columns)).astype(np.int8)
    codes_MK[0], codes_MK[1] = lowest, highest
    count = rows if granularity == "channel" else 1
    scale = arithmetic.round_to_bfloat16(rng.uniform(0.01, 0.1, count).astype(np.float32))
    weight = QuantizedWeight.from_codes(codes_MK, weight_bits, scale)
    return QuantizedLinear(weight, input_bits, np.float32(0.25) if static else None)


@pytest.mark.parametrize(
    ("device", "many_rows"), [("cpu", False), ("cpu", True), ("cuda", False)], ids=["few", "many", "cuda"]
)
@pytest.mark.parametrize("static", [True, False], ids=["tensor", "token"])
@pytest.mark.parametrize(("input_bits", "weight_bits"), [(4, 4), (8, 4), (4, 8), (8, 8)])
def test_integer_products_are_the_specification_bit_for_bit(
    tmp_path, input_bits, weight_bits, static, device, many_rows
):
    """Also what is meant for CUDA, on the CPU."""
    if PROVIDER == "cuda" and device == "cpu":
        pytest.skip("CUDA has no accuracy level 4")
    rng = np.random.default_rng(input_bits + weight_bits)
    for columns, granularity in itertools.product(WIDTHS, ("tensor", "channel")):
        linear = layer(rng, columns, input_bits, weight_bits, static, granularity)
        lowest, highest = arithmetic.code_range(input_bits)
        x_BLK = rng.normal(0, 1, (3, 7, columns)).astype(np.float32)
        x_BLK[0, 0], x_BLK[0, 1], x_BLK[0, 2], x_BLK[0, 3] = lowest * 0.25, highest * 0.25, 1e9, 0
        x_BLK[1] = (rng.integers(2 * lowest, 2 * highest, (7, columns)) + 0.5) * 0.25  # halves: to even

        def build(graph, linear=linear):
            graph.many_rows = many_rows
            return [add_linear(graph, "x", "w", linear)]

        (y_BLM,) = run(tmp_path, build, x_BLK, device)
        weight = linear.weight
        expected_NM = arithmetic.quantized_linear(
            x_BLK.reshape(21, -1), linear.input_scale, weight.codes, weight.scale, input_bits, weight_bits
        )
        np.testing.assert_array_equal(y_BLM.reshape(21, -1), expected_NM)


@pytest.mark.parametrize(("input_bits", "weight_bits"), [(4, 4), (8, 4), (4, 8), (8, 8)])
def test_no_sum_of_two_products_saturates(tmp_path, input_bits, weight_bits):
    """Without VNNI, products of uint8 and int8 are added in pairs in int16; this machine may have VNNI."""
    graph = GraphBuilder()
    graph.input("x", np.float32, ["B", "L", 40])
    graph.many_rows = True
    linear = layer(np.random.default_rng(0), 40, input_bits, weight_bits, static=True)
    graph.output(add_linear(graph, "x", "w", linear), np.float32, ["B", "L", "M"])
    graph.write(tmp_path, {})
    weights = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    largest_input = 2**input_bits - 1  # shifted by half its range
    if "w.int8" in weights:
        assert 2 * largest_input * 2 ** (weight_bits - 1) < 2**15
    else:
        assert weights["w.uint8"].data_type == onnx.TensorProto.UINT8


def test_a_graph_of_which_one_half_is_run(tmp_path):
    """Each half reads what was computed before, a constant and a weight of both."""

    def build(graph):
        doubled = graph.node("Add", "x", "x")
        few = graph.node("LessOrEqual", graph.node("Size", "x"), graph.constant(4, np.int64))
        weight = graph.weight("w", np.array([[3.0]], np.float32))
        halves = (lambda: [graph.node("Mul", doubled, weight)]), (lambda: [graph.node("Sub", doubled, weight)])
        return graph.either(few, *halves, {"chosen": np.float32})

    few, many = np.ones((1, 4, 1), np.float32), np.ones((1, 5, 1), np.float32)
    np.testing.assert_array_equal(run(tmp_path, build, few)[0], 6 * few)
    np.testing.assert_array_equal(run(tmp_path, build, many)[0], -many)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_alone(tmp_path, bits):
    rng = np.random.default_rng(bits)
    for columns in WIDTHS:
        linear = layer(rng, columns, 16, bits, static=False, granularity="channel")
        x_BLK = rng.normal(0, 1, (2, 5, columns)).astype(np.float32)
        (y_BLM,) = run(tmp_path, lambda graph, linear=linear: [add_linear(graph, "x", "w", linear)], x_BLK)
        expected = x_BLK.astype(np.float64) @ linear.weight.dequantized().astype(np.float64).T
        np.testing.assert_allclose(y_BLM, expected, atol=1e-5 * np.abs(expected).max())


def test_layers_that_read_one_tensor(tmp_path):
    """Joined or not, each gives what it gives alone."""
    rng = np.random.default_rng(0)
    x_BLK = rng.normal(0, 1, (2, 3, 40)).astype(np.float32)
    alike = {"a": layer(rng, 40, 4, 4, True, rows=5), "b": layer(rng, 40, 4, 4, True, "channel", rows=9)}
    floats = {"a": rng.normal(0, 1, (5, 40)).astype(np.float32), "b": rng.normal(0, 1, (9, 40)).astype(np.float32)}
    for layers, products in ((alike, 1), (floats, 1), ({**alike, "c": floats["a"]}, 3)):
        graph = GraphBuilder(PROVIDER)
        assert len(add_linears(graph, "x", layers)) == len(layers)
        assert graph.operators().count("MatMulNBits") + graph.operators().count("MatMul") == products
        together = run(tmp_path, lambda graph, layers=layers: add_linears(graph, "x", layers), x_BLK)
        for y_BLM, (name, one) in zip(together, layers.items(), strict=True):
            (alone,) = run(tmp_path, lambda graph, name=name, one=one: [add_linear(graph, "x", name, one)], x_BLK)
            np.testing.assert_allclose(y_BLM, alone, rtol=0, atol=0 if isinstance(one, QuantizedLinear) else 1e-5)


@pytest.mark.parametrize("width", [2, 54, 64, 640, 5504])
def test_hadamard_transforms(tmp_path, width):
    """5504 = 172 * 32; 54 is of no known order, so that the transform has blocks."""
    x_BLK = np.random.default_rng(width).normal(0, 1, (2, 3, width)).astype(np.float32)
    (y_BLK,) = run(tmp_path, lambda graph: [add_hadamard(graph, "x", width)], x_BLK)
    np.testing.assert_allclose(y_BLK, Hadamard.of_width(width).apply(x_BLK.astype(np.float64)), atol=2e-5)


@pytest.mark.parametrize("width", [8, 24, 64, 72])
def test_hadamard_transforms_of_heads(tmp_path, width):
    x_BLK = np.random.default_rng(width).normal(0, 1, (2, 3, 5 * width)).astype(np.float32)

    def build(graph):
        heads = graph.node("Reshape", "x", graph.shape(0, 0, 5, width))
        return [graph.node("Reshape", add_head_hadamard(graph, heads, width), graph.shape(0, 0, -1))]

    (y_BLK,) = run(tmp_path, build, x_BLK)
    expected = Hadamard.of_width(width).apply(x_BLK.astype(np.float64).reshape(2, 3, 5, width)).reshape(x_BLK.shape)
    np.testing.assert_allclose(y_BLK, expected, atol=2e-5)


def test_packed_codes_of_a_block():
    codes_MK = np.array([[-8, 7, 0, 1, -1]], np.int8)
    packed = pack_blocks(codes_MK, 16)
    assert packed.shape == (1, 1, 8)
    nibbles = [int(byte) >> shift & 15 for byte in packed.ravel() for shift in (0, 4)]
    assert [nibble - 8 for nibble in nibbles] == [-8, 7, 0, 1, -1, *[0] * 11]


@pytest.mark.parametrize(("columns", "most"), [(256, 1.41), (640, 1.24), (2048, 1.17), (5504, 1.06)])
def test_block_sizes_waste_little(columns, most):
    """Bytes of codes, of what pads them and of the blocks' scales, over those of the codes alone."""
    size = block_size(columns)
    assert -(-columns // (size - 1)) * (size / 2 + 4) <= most * columns / 2


@pytest.mark.parametrize("columns", [1, 31, 39, 127, 255, 256, 576, 640, 1536, 2048, 5504])
def test_no_block_is_without_the_input_that_is_given_away(columns):
    size = block_size(columns)
    width = group_width(columns, size)
    real = np.tile(np.arange(width + 1) < width, -(-columns // width))
    blocks = [real[start : start + size] for start in range(0, len(real), size)]
    assert not any(block.all() for block in blocks)
    assert len(blocks) == -(-columns // (size - 1))
    assert real.sum() >= columns


def test_the_command(tmp_path):
    source = write_4bit(tmp_path / "source", scheme=named("w4a4").changed(kv_bits=4))
    told = CliRunner().invoke(export, [str(source), "--format", "onnx", "--out", str(tmp_path / "out"), "--json"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.output)
    assert report["format"] == "onnx"
    assert report["precision"] == "w4a4-kv4"
    assert any("held in float32" in note for note in report["notes"])
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.onnx", "model.onnx.data", "osp.json", "tokenizer.json"}
    told = CliRunner().invoke(export, [str(source), "--format", "onnx", "--out", str(tmp_path / "b")])
    assert "precision: w4a4-kv4" in told.output
    assert f"{report['bytes']:,} bytes of weights" in told.output


def test_what_cannot_be_exported(tmp_path):
    source = write_full_precision(tmp_path / "odd", **ODD_WIDTHS)
    out = tmp_path / "out"
    told = CliRunner().invoke(export, [str(source), "--format", "onnx", "--out", str(out)])
    assert told.exit_code == 1
    assert "its heads have a width of 6, and ONNX Runtime takes multiples of 8" in told.output
    told = CliRunner().invoke(export, [str(source), "--format", "onnx", "--out", str(out), "--activations", "token"])
    assert told.exit_code == 2
    assert "--activations is of --format compressed-tensors" in told.output
    assert not out.exists()


def test_a_weight_has_one_name():
    graph = GraphBuilder()
    graph.weight("a", np.zeros(1))
    with pytest.raises(ValueError, match="a weight 'a' already"):
        graph.weight("a", np.zeros(1))
