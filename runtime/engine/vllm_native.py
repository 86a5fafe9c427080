"""The native engine's products as operators of torch: a layer at a time, on torch's own threads, 4 bits a weight.

One call takes rows of floats to rows of floats: it rotates, quantizes, multiplies and rounds to the model's number
type. That is `quant.arithmetic` bit for bit, and it spares the passes over memory that torch would need between them.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from quant.hadamard import Hadamard, base_matrix
from runtime.engine.native_library import load_library
from runtime.engine.vllm_kernels import CodedKernel, FusedWeight, InputScheme

log = logging.getLogger("vllm.osp")

_KERNELS: WeakValueDictionary[int, NativeKernel] = WeakValueDictionary()
"""By handle: operators of torch take tensors and numbers only. A compiled graph outlives the process, in vLLM's cache:
so the handle is a tensor, an input of the graph, and no number that would become part of it."""


class NativeKernel(CodedKernel):
    """`runtime.native._osp.PackedLinear`, which copies the weight into panels of its own."""

    def __init__(self, weight: FusedWeight, inputs: InputScheme) -> None:
        """Packs the weight.

        Raises:
            NativeLibraryError: the extension is not built.
        """
        super().__init__(inputs)
        library = load_library()
        rotation: dict[str, Any] = {}
        if inputs.rotated:
            transform = Hadamard.of_width(weight.columns)
            signs = base_matrix(transform.base)
            rotation = {"blocks": transform.blocks, "power": transform.power, "signs": signs}
        self._layer = library.PackedLinear(
            _team(),
            weight.stored.numpy(),
            weight.columns,
            weight.bits,
            weight.scale.numpy(),
            input_bits=inputs.bits,
            input_scale=None if inputs.scale is None else float(inputs.scale),
            **rotation,
        )
        self._outputs = weight.outputs
        operands = f"int{weight.bits}" if inputs.bits < 16 else f"float times int{weight.bits}"
        self.name = f"native {operands} ({self._layer.kernel}), {weight.bits} bits a weight"
        self._handle = torch.tensor(id(self))
        _KERNELS[id(self)] = self

    @property
    def weight_bytes(self) -> int:
        """What codes and scales take, padding included."""
        return int(self._layer.weight_bytes)

    def __call__(self, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Kernel`."""
        if torch.compiler.is_compiling():
            y_NM: Tensor = torch.ops.osp.native_linear(x_NK, self._handle, self._outputs, dtype)
            return y_NM
        return self.run(x_NK, dtype)  # a call through torch's dispatcher takes as long as a small layer

    def multiply(self, codes_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype) -> Tensor:
        """As `CodedKernel`.

        Raises:
            ValueError: the inputs of this layer are not quantized.
        """
        if torch.compiler.is_compiling():
            y_NM: Tensor = torch.ops.osp.native_product(codes_NK, scales_N1, self._handle, self._outputs, dtype)
            return y_NM
        return self.run_product(codes_NK, scales_N1, dtype)

    def run(self, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """`__call__`, without torch's dispatcher."""
        y_NM = self._output(x_NK.shape[0], dtype)
        self._layer.forward(_as_native(x_NK), y_NM)
        return y_NM.to(dtype)

    def run_product(self, codes_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype) -> Tensor:
        """`multiply`, without torch's dispatcher."""
        y_NM = self._output(codes_NK.shape[0], dtype)
        self._layer.multiply(codes_NK.contiguous(), scales_N1.reshape(-1).contiguous(), y_NM)
        return y_NM.to(dtype)

    def _output(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, self._outputs, dtype=dtype if dtype is torch.bfloat16 else torch.float32)


def _as_native(x: Tensor) -> Tensor:
    """The native engine reads float32 and bfloat16; every float16 is a float32."""
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


# Defined by hand: `torch.library.custom_op` looks for aliases in each call, 4 µs of a small layer's 20.
_TORCH_LIBRARY: Any = torch.library  # in part untyped
_LIBRARY = _TORCH_LIBRARY.Library("osp", "FRAGMENT")
_LIBRARY.define("native_linear(Tensor x_NK, Tensor handle, int outputs, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "native_product(Tensor codes_NK, Tensor scales_N1, Tensor handle, int outputs, ScalarType dtype) -> Tensor"
)


def native_linear(x_NK: Tensor, handle: Tensor, _outputs: int, dtype: torch.dtype) -> Tensor:
    """`NativeKernel.__call__` of the kernel `handle`."""
    return _KERNELS[int(handle)].run(x_NK, dtype)


def native_product(codes_NK: Tensor, scales_N1: Tensor, handle: Tensor, _outputs: int, dtype: torch.dtype) -> Tensor:
    """`NativeKernel.multiply` of the kernel `handle`."""
    return _KERNELS[int(handle)].run_product(codes_NK, scales_N1, dtype)


def _empty_outputs(x_NK: Tensor, _handle: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    return x_NK.new_empty((x_NK.shape[0], outputs), dtype=dtype)


def _empty_product(codes_NK: Tensor, _scales_N1: Tensor, handle: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    return _empty_outputs(codes_NK, handle, outputs, dtype)


_LIBRARY.impl("native_linear", native_linear, "CPU")
_LIBRARY.impl("native_product", native_product, "CPU")
torch.library.register_fake("osp::native_linear", _empty_outputs, lib=_LIBRARY)
torch.library.register_fake("osp::native_product", _empty_product, lib=_LIBRARY)


@cache
def _team() -> Any:
    """As many of torch's threads as torch itself uses."""
    threads = torch.get_num_threads()
    parallel = _openmp() if threads > 1 else 0
    if threads > 1 and not parallel:
        log.warning(
            "This torch does not compute with OpenMP: the native products run on one thread of its %d.", threads
        )
        threads = 1
    return load_library().Team(threads, parallel)


def _openmp() -> int:
    """The address of `GOMP_parallel` in the OpenMP that torch runs on; 0: there is none.

    An OpenMP that was preloaded takes the place of the one that torch was linked to.
    """
    for name in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            address = ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        return address or 0
    return 0
