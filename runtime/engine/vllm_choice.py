"""Which kernel serves a linear layer in vLLM: by device, by what is installed, by what the layer needs.

The first that can serve a layer does. What stands in the way of one that was passed over is logged: a W4A4 model that
runs on another product than one thinks is the fault to prevent.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from runtime.engine.native_library import NativeLibraryError
from runtime.engine.vllm_cuda import Capability, CutlassKernel, MarlinFloatKernel, MarlinKernel
from runtime.engine.vllm_kernels import FloatKernel, FusedWeight, InputScheme, IntegerKernel, Kernel
from runtime.engine.vllm_native import NativeKernel, load_operators

# Below "vllm", whose handlers print what its engine processes log.
log = logging.getLogger("vllm.osp")


def choose_kernel(weight: FusedWeight, inputs: InputScheme, dtype: torch.dtype) -> Kernel:
    """The kernel for a weight on its device.

    Args:
        dtype: of the outputs.
    """
    device = weight.stored.device
    if device.type == "cpu" and _native_serves():
        return NativeKernel(weight, inputs)
    if device.type == "cuda":
        kind = cuda_kernel(weight, inputs, dtype, torch.cuda.get_device_capability(device))
        if kind is not None:
            return kind(weight, inputs, dtype)
    return FloatKernel(weight, inputs) if inputs.bits == 16 else IntegerKernel(weight, inputs)


def cuda_kernel(
    weight: FusedWeight, inputs: InputScheme, dtype: torch.dtype, capability: Capability
) -> type[MarlinKernel | MarlinFloatKernel | CutlassKernel] | None:
    """The kernel of vLLM for a card of some capability; None where torch's own has to serve."""
    kind: type[MarlinKernel | MarlinFloatKernel | CutlassKernel]
    if weight.bits == 4:
        kind = MarlinFloatKernel if inputs.bits == 16 else MarlinKernel
    elif inputs.bits < 16:
        kind = CutlassKernel
    else:
        return None
    obstacle = kind.obstacle(weight, dtype, capability)
    if obstacle is None:
        return kind
    log.info("not %s for a layer of %d outputs: %s", kind.name, weight.outputs, obstacle)
    return None


@cache
def _native_serves() -> bool:
    try:
        load_operators()
    except NativeLibraryError as error:
        log.warning("4-bit weights take 8 bits of memory, and torch's own products serve: %s", error)
        return False
    return True
