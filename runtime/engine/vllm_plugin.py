"""Plugs the 4-bit checkpoints of this project into vLLM: `vllm serve DIRECTORY` runs one as it lies on disk.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`); from then on, it knows
`quant_method: osp`. The model is vLLM's own LlamaForCausalLM. What the parts do:

    vllm_quantization.py   config.json's quantization_config -> a method for each layer; the checkpoint is checked
    vllm_methods.py        parameters, fusing and sharding, what a layer computes
    vllm_choice.py         which product serves a layer
    vllm_kernels.py        what a product is; torch's own, by vllm_arithmetic.py, quant.arithmetic in torch
    vllm_native.py         the native engine's, on CPUs
    vllm_cuda.py           vLLM's, on CUDA cards
    vllm_lifeline.py       the end of a process whose server has been killed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NAME = "osp"


def register() -> None:
    """Makes `osp` a quantization method of vLLM; may be called several times.

    In a process of a server of ours, it also sees to it that the process ends with the server.

    Raises:
        ImportError: this vLLM is not one that the plugin was written for.
    """
    from runtime.engine.vllm_lifeline import hold_lifeline

    hold_lifeline()
    from vllm.model_executor.layers.quantization import register_quantization_config

    from runtime.engine.vllm_quantization import OspConfig

    register_quantization_config(NAME)(OspConfig)


def kernels_in_use(model: Any) -> dict[str, str]:
    """Kind of layer ("qkv_proj", "down_proj", "lm_head") -> the name of the kernel that serves it.

    Args:
        model: vLLM's, in a process of its workers.
    """
    from runtime.engine.vllm_methods import kernels_of

    return kernels_of(model)


def kernels_text(of_workers: Iterable[Mapping[str, str]]) -> str:
    """What workers say of their kernels, for people: "KERNEL (qkv_proj, o_proj); OTHER (lm_head)".

    Args:
        of_workers: `kernels_in_use` of each. Where workers differ, a kind of layer stands beside each of its kernels.
    """
    kinds: dict[str, dict[str, None]] = {}
    for kernels in of_workers:
        for kind, kernel in kernels.items():
            kinds.setdefault(kernel, {})[kind] = None
    return "; ".join(f"{kernel} ({', '.join(found)})" for kernel, found in kinds.items())


class WorkerExtension:
    """What vLLM's workers can be asked: `worker_extension_cls="runtime.engine.vllm_plugin.WorkerExtension"`, then
    `collective_rpc("osp_kernels_in_use")`, an answer for each worker."""

    model_runner: Any

    def osp_kernels_in_use(self) -> dict[str, str]:
        """`kernels_in_use` of this worker's model; {} where its quantization is not osp's."""
        return kernels_in_use(self.model_runner.model)
