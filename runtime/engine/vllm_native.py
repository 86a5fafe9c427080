"""The native engine's products as operators of torch: a layer at a time, on torch's own threads, 4 bits a weight.

One call takes rows of floats to rows of floats: it rotates, quantizes, multiplies and rounds to the model's number
type. That is `quant.arithmetic` bit for bit, and it spares the passes over memory that torch would need between them.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.hadamard import Hadamard, base_matrix
from runtime.engine.native_library import NativeLibraryError, load_library
from runtime.engine.vllm_kernels import CodedKernel, FusedWeight, InputScheme

log = logging.getLogger("vllm.osp")

TORCH_CPU = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


class NativeKernel(CodedKernel):
    """`runtime.native._osp.PackedLinear`, which copies the weight into panels of its own."""

    def __init__(self, weight: FusedWeight, inputs: InputScheme) -> None:
        """Packs the weight.

        Raises:
            NativeLibraryError: the extension is not built, or does not fit this torch.
        """
        super().__init__(inputs)
        load_operators()
        rotation: dict[str, Any] = {}
        if inputs.rotated:
            transform = Hadamard.of_width(weight.columns)
            signs = base_matrix(transform.base)
            rotation = {"blocks": transform.blocks, "power": transform.power, "signs": signs}
        self._layer = load_library().PackedLinear(
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
        # A compiled graph outlives the process, in vLLM's cache: the address is a tensor, an input of the graph, and no
        # number that would become part of it.
        self._handle = torch.from_numpy(self._layer.handle())

    @property
    def weight_bytes(self) -> int:
        """What codes and scales take, padding included."""
        return int(self._layer.weight_bytes)

    def __call__(self, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Kernel`."""
        x_NK = (x_NK if x_NK.dtype in _NUMBERS else x_NK.float()).contiguous()
        y_NM: Tensor = torch.ops.osp.native_linear(x_NK, self._handle, self._outputs, _native(dtype))
        return y_NM.to(dtype)

    def multiply(self, codes_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype) -> Tensor:
        """As `CodedKernel`.

        Raises:
            ValueError: the inputs of this layer are not quantized.
        """
        codes_NK, scales_N = codes_NK.contiguous(), scales_N1.reshape(-1).contiguous()
        y_NM: Tensor = torch.ops.osp.native_product(codes_NK, scales_N, self._handle, self._outputs, _native(dtype))
        return y_NM.to(dtype)


_NUMBERS = (torch.float32, torch.bfloat16)
"""What the native engine reads and writes; every float16 is a float32."""


def _native(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _NUMBERS else torch.float32


_TORCH_LIBRARY: Any = torch.library  # in part untyped
_LIBRARY = _TORCH_LIBRARY.Library("osp", "FRAGMENT")
_LIBRARY.define("native_linear(Tensor x_NK, Tensor layer, int outputs, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "native_product(Tensor codes_NK, Tensor scales_N, Tensor layer, int outputs, ScalarType dtype) -> Tensor"
)


def _empty_outputs(x_NK: Tensor, _layer: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    return x_NK.new_empty((x_NK.shape[0], outputs), dtype=dtype)


def _empty_product(codes_NK: Tensor, _scales_N: Tensor, layer: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    return _empty_outputs(codes_NK, layer, outputs, dtype)


torch.library.register_fake("osp::native_linear", _empty_outputs, lib=_LIBRARY)
torch.library.register_fake("osp::native_product", _empty_product, lib=_LIBRARY)


@cache
def load_operators() -> None:
    """Implements torch's operators in C++: a call through Python takes as long as a small layer.

    Raises:
        NativeLibraryError: the extension is not built, or this torch has not the C interface; 2.13 has.
    """
    library = load_library()
    try:
        library.implement_torch_operators(partial(_address, TORCH_CPU))
    except (AttributeError, OSError) as error:
        raise NativeLibraryError(f"torch {torch.__version__} lacks a part of its stable C interface: {error}") from None


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
    for name in (None, TORCH_CPU):
        try:
            return _address(name, "GOMP_parallel")
        except (OSError, AttributeError):
            continue
    return 0


def _address(library: str | None, function: str) -> int:
    """Where a function of a shared library is; of None, of those that this process has for all.

    Raises:
        OSError: the library cannot be opened.
        AttributeError: it has no such function.
    """
    return ctypes.cast(ctypes.CDLL(library)[function], ctypes.c_void_p).value or 0
