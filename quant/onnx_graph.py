"""An ONNX graph as it grows, and the two files that it becomes. numpy and onnx, no torch.

Small constants lie in the graph; weights lie in a file beside it, for a graph may have 2 GB at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quant.onnx_directory import GRAPH_FILE, WEIGHTS_FILE

OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
"""What ONNX Runtime reads from version 1.20 on."""

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

INLINE_BYTES = 1024
"""A constant of so many bytes lies in the graph: shapes must, for ONNX Runtime infers others from them."""

ALIGNMENT = 4096
"""Weights begin at multiples of it, so that ONNX Runtime can map the file."""

Shape = Sequence[int | str]


class GraphBuilder:
    """Collects nodes and weights. Every method that adds a node gives the names of what the node computes."""

    def __init__(self, device: str = "cpu") -> None:
        """Args:
        device: what the graph is for, one of `CACHE_TYPES`; what it changes is the business of who adds nodes.
        """
        self.device = device
        self.many_rows = False
        """Whether what is added is for many rows at once, for which other products may be faster than for few."""
        self._nodes: list[onnx.NodeProto] = []
        self._count = 0
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._weights: dict[str, NDArray[Any]] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def input(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        """Declares an input; a dimension that varies is a word."""
        self._inputs.append(helper.make_tensor_value_info(name, np_kind(dtype), list(shape)))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Shape) -> None:
        """Declares that what is called `name` is an output."""
        self._outputs.append(helper.make_tensor_value_info(name, np_kind(dtype), list(shape)))

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output."""
        return self.nodes(operator, inputs, 1, domain=domain, **attributes)[0]

    def nodes(
        self, operator: str, inputs: Sequence[str], outputs: int | Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Adds a node with several outputs: so many, or those of the given names."""
        self._count += 1
        name = f"{operator}.{self._count}"
        names = [f"{name}.{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(helper.make_node(operator, inputs, names, name, domain=domain, **attributes))
        return names

    def either(
        self,
        condition: str,
        first: Callable[[], Sequence[str]],
        second: Callable[[], Sequence[str]],
        outputs: Mapping[str, type[np.generic]],
    ) -> list[str]:
        """Adds two graphs of which one is run: `first` where the condition holds, else `second`.

        Args:
            first, second: add nodes, which may read whatever was added before, and give the names of what they compute.
            outputs: under which names what was computed goes on, and of which types it is.
        """
        kinds = [np_kind(dtype) for dtype in outputs.values()]
        branches = {"then_branch": self._branch(first, kinds), "else_branch": self._branch(second, kinds)}
        return self.nodes("If", [condition], list(outputs), **branches)

    def _branch(self, build: Callable[[], Sequence[str]], kinds: Sequence[int]) -> onnx.GraphProto:
        around, self._nodes = self._nodes, []
        names = build()
        nodes, self._nodes = self._nodes, around
        outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, kinds, strict=True)]
        return helper.make_graph(nodes, f"branch.{self._count}", [], outputs)

    def constant(self, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """The name of a small constant; equal ones are one."""
        array = np.asarray(values, dtype)
        key = array.dtype.str, array.shape, array.tobytes()
        return self._constants.setdefault(key, f"constant.{len(self._constants)}")

    def shape(self, *sizes: int) -> str:
        """A constant to be used as a shape, axes or places; in a shape, 0 keeps a dimension."""
        return self.constant(sizes, np.int64)

    def weight(self, name: str, values: NDArray[Any]) -> str:
        """Adds a weight.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self._weights:
            raise ValueError(f"the graph has a weight {name!r} already")
        self._weights[name] = np.ascontiguousarray(values)
        return name

    def shared_weight(self, name: str, make: Callable[[], NDArray[Any]]) -> str:
        """A weight that several nodes read: made when it is first asked for."""
        return name if name in self._weights else self.weight(name, make())

    def operators(self) -> list[str]:
        """Which operators it has, but for those of branches, in the order in which they were added."""
        return [node.op_type for node in self._nodes]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in self._weights.values())

    def write(self, directory: Path, metadata: Mapping[str, str]) -> None:
        """Writes `GRAPH_FILE` and `WEIGHTS_FILE` into a directory; `metadata` goes into the graph."""
        initializers = [
            numpy_helper.from_array(np.frombuffer(data, dtype).reshape(shape), name)
            for (dtype, shape, data), name in self._constants.items()
        ]
        with (directory / WEIGHTS_FILE).open("wb") as file:
            for name, array in self._weights.items():
                if array.nbytes <= INLINE_BYTES:
                    initializers.append(numpy_helper.from_array(array, name))
                    continue
                file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                initializers.append(_external(name, array, file.tell()))
                file.write(array.data)
        graph = helper.make_graph(self._nodes, "llama", self._inputs, self._outputs, initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="osp-runtime")
        helper.set_model_props(model, dict(metadata))
        (directory / GRAPH_FILE).write_bytes(model.SerializeToString())


def _external(name: str, array: NDArray[Any], offset: int) -> onnx.TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": WEIGHTS_FILE, "offset": offset, "length": array.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def np_kind(dtype: type[np.generic]) -> int:
    """ONNX's number of a numpy type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
