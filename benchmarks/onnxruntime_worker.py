"""ONNX Runtime as a worker: a model's matrix products as MatMulNBits, in one session.

Blocks of 128 weights have a scale; accuracy level 4 lets the operator quantize activations to int8. Weights lie in a
file beside the graph, for a graph may have 2 GB at most.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from benchmarks.product_bench import ProductBench
from benchmarks.random_int4 import Matrix, head_matrix, layer_matrix, random_nibbles
from benchmarks.worker import arguments, serve
from trainer.config import ModelConfig, preset

BLOCK = 128
ACCURACY_INT8 = 4
CONTRIB = "com.microsoft"


class OnnxRuntimeProducts:
    """A session; see `benchmarks.product_bench.Products`."""

    def __init__(self, graph: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, x_ND: NDArray[np.float32], head_rows: int) -> NDArray[np.float32]:
        """As `Products`."""
        inputs = {"x": x_ND, "head_start": np.array([-head_rows], np.int64)}
        logits_NV: NDArray[np.float32] = self._session.run(None, inputs)[0]
        return logits_NV


class GraphWriter:
    """Collects a graph, while the data of its weights go to a file."""

    def __init__(self, data: Path, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._data, self._file, self._rng = data, data.open("wb"), np.random.default_rng(seed)

    def product(self, x: str, matrix: Matrix) -> str:
        """Adds a product with `x`, and gives the name of its result, which begins with the matrix's."""
        name = f"{matrix.name}.{len(self.nodes)}"
        blocks = -(-matrix.K // BLOCK)
        packed = random_nibbles(self._rng, matrix.N * blocks * BLOCK // 2, zero=8)
        scales = np.full(matrix.N * blocks, matrix.scale, np.float32)
        weights = [
            self._external(f"{name}.codes", packed.reshape(matrix.N, blocks, BLOCK // 2), TensorProto.UINT8),
            self._external(f"{name}.scales", scales, TensorProto.FLOAT),
        ]
        settings = {"K": matrix.K, "N": matrix.N, "bits": 4, "block_size": BLOCK, "accuracy_level": ACCURACY_INT8}
        self.nodes.append(helper.make_node("MatMulNBits", [x, *weights], [name], domain=CONTRIB, **settings))
        return name

    def sum(self, *names: str) -> str:
        """Adds a sum, and gives the name of its result."""
        result = f"sum.{len(self.nodes)}"
        self.nodes.append(helper.make_node("Sum", names, [result]))
        return result

    def close(self) -> None:
        """Ends the file of the weights."""
        self._file.close()

    def _external(self, name: str, array: NDArray[np.generic], kind: int) -> str:
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        place = {"location": self._data.name, "offset": self._file.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        array.tofile(self._file)
        self.initializers.append(tensor)
        return name


def write_graph(path: Path, model: ModelConfig) -> None:
    """Writes the chain of products to `path`, and its weights beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GraphWriter(path.with_suffix(".data"))
    h = "x"
    for _ in range(model.num_layers):
        qkv = writer.sum(*(writer.product(h, layer_matrix(model, name)) for name in ("q", "k", "v")))
        h = writer.product(qkv, layer_matrix(model, "o"))
        gate_up = writer.sum(*(writer.product(h, layer_matrix(model, name)) for name in ("gate", "up")))
        h = writer.product(gate_up, layer_matrix(model, "down"))
    for name, number in (("end", np.iinfo(np.int64).max), ("axis", 0)):
        writer.initializers.append(helper.make_tensor(name, TensorProto.INT64, [1], [number]))
    writer.nodes.append(helper.make_node("Slice", [h, "head_start", "end", "axis"], ["last"]))
    logits = writer.product("last", head_matrix(model))
    writer.close()
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, ["N", model.hidden_size]), value("head_start", TensorProto.INT64, [1])]
    outputs = [value(logits, TensorProto.FLOAT, ["head_rows", model.vocab_size])]
    graph = helper.make_graph(writer.nodes, "products", inputs, outputs, writer.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def main() -> None:
    """Serves measurements of ONNX Runtime; writes its graph first, if there is none."""
    options = arguments("ONNX Runtime, MatMulNBits, matrix products alone").parse_args()
    model = preset(options.shape).model
    graph = options.directory / f"{options.shape}.onnx"
    if not graph.exists():
        write_graph(graph, model)
    about = {"engine": "ONNX Runtime", "version": onnxruntime.__version__, "weights": f"int4, blocks of {BLOCK}"}
    serve(lambda: ProductBench(OnnxRuntimeProducts(graph, options.threads), model.hidden_size), about)


if __name__ == "__main__":
    main()
