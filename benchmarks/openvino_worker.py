"""OpenVINO as a worker: a model's matrix products, int4 weights with a scale for every output channel.

The plugin of the CPU recognizes Convert(int4) -> Multiply(scale) -> MatMul as a compressed weight. With
DYNAMIC_QUANTIZATION_GROUP_SIZE it quantizes activations to int8, in groups of that size, and multiplies integers.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from benchmarks.product_bench import ProductBench
from benchmarks.random_int4 import Matrix, head_matrix, layer_matrix, random_nibbles
from benchmarks.worker import arguments, serve
from trainer.config import ModelConfig, preset

GROUP = 128


class OpenVinoProducts:
    """A compiled chain of products; see `benchmarks.product_bench.Products`."""

    def __init__(self, model: ModelConfig, threads: int) -> None:
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        }
        self._request = ov.Core().compile_model(_chain(model), "CPU", settings).create_infer_request()

    def __call__(self, x_ND: NDArray[np.float32], head_rows: int) -> NDArray[np.float32]:
        """As `Products`; the result is valid until the next call."""
        inputs = {"x": x_ND, "head_start": np.array([-head_rows], np.int64)}
        outputs = self._request.infer(inputs, share_inputs=True, share_outputs=True)
        logits_NV: NDArray[np.float32] = outputs[0]
        return logits_NV


def _chain(model: ModelConfig) -> ov.Model:
    rng = np.random.default_rng(0)

    def product(x: ov.Node, matrix: Matrix) -> ov.Node:
        # The tensor owns its memory. One around a numpy array would not: the constant outlives that array.
        codes_NK = ov.Tensor(ov.Type.i4, ov.Shape([matrix.N, matrix.K]))
        codes_NK.data[:] = random_nibbles(rng, matrix.N * matrix.K // 2, zero=0).reshape(codes_NK.data.shape)
        codes = ops.constant(codes_NK)
        scale = ops.constant(np.full((matrix.N, 1), matrix.scale, np.float32))
        return ops.matmul(x, ops.multiply(ops.convert(codes, np.float32), scale), False, True)

    x = ops.parameter([-1, model.hidden_size], np.float32, name="x")
    head_start = ops.parameter([1], np.int64, name="head_start")
    x.output(0).tensor.set_names({"x"})
    head_start.output(0).tensor.set_names({"head_start"})
    h = x
    for _ in range(model.num_layers):
        q, k, v = (product(h, layer_matrix(model, name)) for name in ("q", "k", "v"))
        h = product(ops.add(ops.add(q, k), v), layer_matrix(model, "o"))
        gate, up = (product(h, layer_matrix(model, name)) for name in ("gate", "up"))
        h = product(ops.add(gate, up), layer_matrix(model, "down"))
    end, step, axis = (ops.constant(np.array([value], np.int64)) for value in (np.iinfo(np.int64).max, 1, 0))
    logits = product(ops.slice(h, head_start, end, step, axis), head_matrix(model))
    return ov.Model([logits], [x, head_start], "products")


def main() -> None:
    """Serves measurements of OpenVINO."""
    options = arguments("OpenVINO, int4, matrix products alone").parse_args()
    model = preset(options.shape).model
    about = {"engine": "OpenVINO", "version": ov.get_version(), "weights": "int4, a scale an output channel"}
    serve(lambda: ProductBench(OpenVinoProducts(model, options.threads), model.hidden_size), about)


if __name__ == "__main__":
    main()
